"""What E2B's clients are refused, and how they are told."""

import asyncio
from pathlib import Path

import pytest

from support.api_server import Server, Team, make_settings, serve
from support.e2b import created, listed
from support.host_double import HostDouble
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.ids import e2b_key, new_api_key

_UNSUPPORTED = {
    "volumeMounts": [{"name": "data", "path": "/data"}],
    "mcp": {"browserbase": {}},
    "iam": {"tokens": {}},
    "autoResume": {"enabled": True},
    "autoPauseMemory": False,
    "unheardOf": 1,
    "timeout": -1,
    "envVars": {"1": "x"},
    "metadata": {"k": 1},
    "network": {"maskRequestHost": "localhost"},
    "network.httpsPorts": [443],
    "network.dnsServers": ["8.8.8.8"],
    "network.egressProxy": {"address": "x"},
    "network.rules": {"example.com": []},
    "network.allowOut": ["*.com"],
    "network.denyOut": ["example.com"],
    "network.unheardOf": 1,
}


@pytest.mark.parametrize("field", _UNSUPPORTED)
async def test_what_is_not_supported_is_refused_by_its_name(
    faulty: Server, user: Team, field: str
) -> None:
    outer, _, inner = field.partition(".")
    body = {outer: {inner: _UNSUPPORTED[field]}} if inner else {outer: _UNSUPPORTED[field]}
    for path in ("/sandboxes", "/v2/sandboxes"):
        answer = await user.client.post(path, json={"templateID": "minimal", **body})
        assert answer.status_code == 400, answer.text
        assert answer.json()["message"].startswith(field), answer.text
    assert await listed(user) == []


async def test_empty_fields_ask_for_nothing(faulty: Server, user: Team) -> None:
    nothing: dict[str, object] = {
        "volumeMounts": [],
        "mcp": None,
        "iam": None,
        "network": {"rules": {}},
    }
    json = {"templateID": "minimal", **nothing, "secure": False, "autoResume": {"enabled": False}}
    assert (await user.client.post("/v2/sandboxes", json=json)).status_code == 201


_BAD = [
    ("POST", "/sandboxes/ID/pause", {"memory": False}),
    ("POST", "/sandboxes/ID/pause", {"unheardOf": True}),
    ("POST", "/sandboxes/ID/snapshots", {"memory": False}),
    ("POST", "/sandboxes/ID/snapshots", {"name": "another-team/mine"}),
    ("POST", "/sandboxes/ID/snapshots", {"name": "mine:v2"}),
    ("POST", "/sandboxes/ID/snapshots", {"name": "no name"}),
    ("POST", "/sandboxes/ID/connect", {}),
    ("POST", "/sandboxes/ID/timeout", {}),
    ("POST", "/sandboxes/ID/timeout", {"timeout": 10**9}),
    ("POST", "/sandboxes/ID/timeout", {"timeout": 1.5}),
    ("POST", "/sandboxes/ID/fork", {"count": 21}),
    ("PUT", "/sandboxes/ID/network", {"allowOut": ["localhost"]}),
    ("PUT", "/sandboxes/ID/network", {"allowOut": ["10.0.0.1"]}),
    ("PUT", "/sandboxes/ID/network", {"allowPublicTraffic": True}),
    ("GET", "/v2/sandboxes?state=asleep", None),
    ("GET", "/v2/sandboxes?limit=101", None),
    ("GET", "/v2/sandboxes?nextToken=x", None),
    ("GET", "/v2/sandboxes?order=up", None),
    ("GET", "/v2/sandboxes?startedAfter=2026-11-01T12:00:30", None),
    ("GET", "/v2/sandboxes?metadata=a%3D%2525ff", None),
    ("GET", "/v2/sandboxes?unheardOf=1", None),
    ("GET", "/snapshots?unheardOf=1", None),
]


async def test_requests_of_e2b_that_are_not_acceptable(faulty: Server, user: Team) -> None:
    id = await created(user)
    for method, path, body in _BAD:
        answer = await user.client.request(method, path.replace("ID", id), json=body)
        assert (answer.status_code, answer.json()["code"]) == (400, 400), (path, body, answer.text)
    assert await listed(user) == [id]


async def test_templates_that_are_not_there(faulty: Server, user: Team) -> None:
    for template in ("code-interpreter-v1", "minimal:v2", "team-x/minimal", "", "a b", "\u00fc"):
        answer = await user.client.post("/v2/sandboxes", json={"templateID": template})
        assert (answer.status_code, answer.json()["code"]) == (404, 404), template
    answer = await user.client.post("/v2/sandboxes", json={})
    assert answer.status_code == 404
    assert "wrenn template build base" in answer.json()["message"]


async def test_errors_that_come_before_the_routes_have_the_form_of_e2b(
    faulty: Server, user: Team
) -> None:
    stranger = faulty.client()
    assert (await stranger.get("/v2/sandboxes")).status_code == 401
    assert (await user.client.get("/v2/nothing")).status_code == 404
    answer = await user.client.patch("/sandboxes")
    assert (answer.status_code, answer.json()["code"]) == (405, 405)
    answer = await user.client.post("/v2/sandboxes", content=b"x" * (2 << 20))
    assert (answer.status_code, answer.json()["code"]) == (413, 413)
    answer = await user.client.post("/v2/sandboxes", content=b"{")
    assert (answer.status_code, answer.json()["error_code"]) == (400, "invalid_request")


async def test_a_quota_that_is_reached_is_no_reason_to_ask_again(
    tmp_path: Path, host: HostDouble
) -> None:
    async with serve(make_settings(tmp_path, None, quota_running=1), host) as server:
        team = await server.team()
        await created(team)
        answer = await team.client.post("/v2/sandboxes", json={"templateID": "minimal"})
        assert (answer.status_code, answer.json()["error_code"]) == (429, "quota_exceeded")
        assert answer.headers["should-retry"] == "false"


async def test_a_client_is_told_whether_to_send_a_request_again(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    host.fail["create"] = HostFailure("The machine did not start")
    answer = await user.client.post("/v2/sandboxes", json={"templateID": "minimal"})
    assert (answer.status_code, answer.headers["should-retry"]) == (502, "false")


async def test_a_key_is_given_in_either_spelling(faulty: Server, user: Team) -> None:
    for path in ("/v2/sandboxes", "/v1/sandboxes"):
        for key, status in (
            (e2b_key(user.key), 200),
            (e2b_key(user.key)[:-1] + "x", 401),
            (e2b_key(new_api_key()), 401),
            ("e2b_" + user.key[4:] + "00000000", 401),
            (e2b_key(user.key).upper(), 401),
        ):
            answer = await faulty.client({"X-API-Key": key}).get(path)
            assert answer.status_code == status, key


async def test_a_paused_sandbox_is_paused_no_second_time(faulty: Server, user: Team) -> None:
    id = await created(user)
    answers = await asyncio.gather(
        *(user.client.post(f"/sandboxes/{id}/pause", json={}) for _ in range(2))
    )
    assert sorted(each.status_code for each in answers) == [204, 409]
