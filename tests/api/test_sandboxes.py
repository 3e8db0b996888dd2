"""The life of sandboxes through the API, on real processes."""

import asyncio
from datetime import UTC, datetime, timedelta

import httpx2
import pytest

from support.api_server import Server, Team
from support.host_double import HostDouble
from wrenn_sandbox.model.template import Size


async def _create(team: Team, **body: object) -> str:
    answer = await team.client.post("/v1/sandboxes", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.mark.parametrize(
    ("given", "size"), [({}, (2, 1024)), ({"vcpus": 1}, (1, 1024)), ({"memory_mb": 256}, (2, 256))]
)
async def test_what_is_not_said_of_the_size_is_the_templates(
    user: Team, host: HostDouble, given: dict[str, int], size: tuple[int, int]
) -> None:
    host.template_size = Size(2, 1024)
    answer = await user.client.post("/v1/sandboxes", json=given)
    assert (answer.json()["vcpus"], answer.json()["memory_mb"]) == size


@pytest.mark.parametrize("body", [b"", b" \n", b"{}", b'{"unknown": {"fields": ["ignored"]}}'])
async def test_create_with_defaults(team: Team, body: bytes) -> None:
    before = datetime.now(UTC)
    answer = await team.client.post("/v1/sandboxes", content=body)
    assert answer.status_code == 201, answer.text
    sandbox = answer.json()
    assert sandbox["id"].startswith("sb-")
    assert sandbox["status"] == "running"
    assert sandbox["template"] == "minimal"
    assert (sandbox["vcpus"], sandbox["memory_mb"], sandbox["timeout_sec"]) == (1, 512, 0)
    assert sandbox["guest_ip"]
    assert sandbox["host_ip"]
    started = datetime.fromisoformat(sandbox["started_at"])
    assert before <= datetime.fromisoformat(sandbox["created_at"]) <= started
    assert started.tzinfo is not None
    assert sandbox["last_active_at"] == sandbox["started_at"]
    assert (await team.client.get(f"/v1/sandboxes/{sandbox['id']}")).json() == sandbox


_BAD_SANDBOXES: list[tuple[dict[str, object], str]] = [
    ({"vcpus": 0}, "vcpus"),
    ({"vcpus": 9}, "vcpus"),
    ({"vcpus": 10**400}, "vcpus"),
    ({"vcpus": "1"}, "vcpus"),
    ({"vcpus": True}, "vcpus"),
    ({"vcpus": 1.5}, "vcpus"),
    ({"vcpus": None}, "vcpus"),
    ({"memory_mb": 127}, "memory_mb"),
    ({"memory_mb": 8193}, "memory_mb"),
    ({"memory_mb": -(2**63)}, "memory_mb"),
    ({"timeout_sec": -1}, "timeout_sec"),
    ({"timeout_sec": 86_401}, "timeout_sec"),
    ({"template": 5}, "template"),
]


async def test_create_with_values_that_are_not_acceptable(faulty: Server, user: Team) -> None:
    for body, field in _BAD_SANDBOXES:
        answer = await user.client.post("/v1/sandboxes", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_request"
        assert field in answer.json()["error"]["message"]
        assert (await user.client.get("/v1/sandboxes")).json() == []


_UNKNOWN_TEMPLATES: list[str] = ["unknown", "", "../minimal", "nul\0", "x" * 500, "ü"]


async def test_create_from_an_unknown_template(faulty: Server, user: Team) -> None:
    for template in _UNKNOWN_TEMPLATES:
        answer = await user.client.post("/v1/sandboxes", json={"template": template})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"


async def test_delete_is_final_and_repeatable(team: Team) -> None:
    id = await _create(team)
    for _ in range(2):
        assert (await team.client.delete(f"/v1/sandboxes/{id}")).status_code == 204
        assert (await team.client.get(f"/v1/sandboxes/{id}")).json()["status"] == "stopped"
    listed = (await team.client.get("/v1/sandboxes")).json()
    assert [(each["id"], each["status"]) for each in listed] == [(id, "stopped")]


_ACTIONS: list[str] = ["ping", "exec", "pause", "resume"]


async def test_a_stopped_sandbox_can_do_nothing(team: Team) -> None:
    for action in _ACTIONS:
        id = await _create(team)
        await team.client.delete(f"/v1/sandboxes/{id}")
        answer = await team.client.post(f"/v1/sandboxes/{id}/{action}", json={"cmd": "true"})
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "invalid_state"
        assert "stopped" in answer.json()["error"]["message"]


_UNKNOWN_IDS: list[str] = [
    "sb-" + "a" * 20,
    "sb-",
    "x",
    "sb-%00",
    "%F0%9F%A6%9C",
    "a" * 5000,
    "..%2f..%2fx",
]


async def test_unknown_ids_are_not_found(faulty: Server, user: Team) -> None:
    for id in _UNKNOWN_IDS:
        for method, action in (
            ("GET", ""),
            ("DELETE", ""),
            ("GET", "/events"),
            ("POST", "/ping"),
            ("POST", "/exec"),
            ("POST", "/pause"),
            ("POST", "/resume"),
        ):
            answer = await user.client.request(
                method, f"/v1/sandboxes/{id}{action}", json={"cmd": "true"}
            )
            assert answer.status_code == 404, action
            assert answer.json()["error"]["code"] == "not_found"


async def test_list_is_newest_first_and_paged(faulty: Server, user: Team) -> None:
    made = [await _create(user) for _ in range(5)]
    everything = await user.client.get("/v1/sandboxes")
    assert [each["id"] for each in everything.json()] == made[::-1]
    assert "x-next-cursor" not in everything.headers
    pages, cursor = [], ""
    while True:
        page = await user.client.get(f"/v1/sandboxes?limit=2{cursor}")
        pages.append([each["id"] for each in page.json()])
        if "x-next-cursor" not in page.headers:
            break
        cursor = f"&cursor={page.headers['x-next-cursor']}"
        assert cursor in page.headers["link"]
    assert pages == [made[:2:-1], made[2:0:-1], made[:1]]


async def test_ping_moves_the_activity(team: Team) -> None:
    id = await _create(team)
    before = (await team.client.get(f"/v1/sandboxes/{id}")).json()["last_active_at"]
    assert (await team.client.post(f"/v1/sandboxes/{id}/ping")).status_code == 204
    after = (await team.client.get(f"/v1/sandboxes/{id}")).json()["last_active_at"]
    assert datetime.fromisoformat(after) > datetime.fromisoformat(before)


async def test_the_history_tells_every_transition(team: Team) -> None:
    id = await _create(team)
    await team.client.delete(f"/v1/sandboxes/{id}")
    history = (await team.client.get(f"/v1/sandboxes/{id}/events")).json()
    assert [(each.get("from"), each["to"], each["actor"]) for each in history] == [
        ("stopping", "stopped", "user"),
        ("running", "stopping", "user"),
        ("starting", "running", "user"),
        ("pending", "starting", "user"),
        (None, "pending", "user"),
    ]
    times = [datetime.fromisoformat(each["time"]) for each in history]
    assert times == sorted(times, reverse=True)
    first = await team.client.get(f"/v1/sandboxes/{id}/events?limit=2")
    rest = await team.client.get(
        f"/v1/sandboxes/{id}/events?cursor={first.headers['x-next-cursor']}"
    )
    assert first.json() + rest.json() == history


async def test_sandboxes_are_made_at_once(server: Server, team: Team) -> None:
    made = await asyncio.gather(*(_create(team) for _ in range(4)))
    assert len(set(made)) == 4
    gone = await asyncio.gather(
        *(team.client.delete(f"/v1/sandboxes/{id}") for id in made for _ in range(2))
    )
    assert {answer.status_code for answer in gone} == {204}


async def test_ended_sandboxes_are_forgotten_after_a_time(faulty: Server, user: Team) -> None:
    ended, running = await _create(user), await _create(user)
    await user.client.delete(f"/v1/sandboxes/{ended}")
    store = faulty.plane.store.all_sandboxes
    assert await store.remove_ended(datetime.now(UTC) - timedelta(hours=1)) == 0
    assert await store.remove_ended(datetime.now(UTC) + timedelta(hours=1)) == 1
    listed = (await user.client.get("/v1/sandboxes")).json()
    assert [each["id"] for each in listed] == [running]
    assert (await user.client.get(f"/v1/sandboxes/{ended}")).status_code == 404


_SOCKETS = ("/exec/stream", "/processes/{process}/stream", "/pty")
"""Asked without an upgrade they answer 400 whoever asks; the tests of the sockets try theirs."""


async def test_nobody_reaches_anything_of_another_team(faulty: Server, user: Team) -> None:
    """Over all routes with a resource in their path, with a key and with a token."""
    id = await _create(user)
    other = await _create(user)
    snapshot = await user.client.post(
        "/v1/snapshots", json={"sandbox_id": other, "name": "private"}
    )
    assert snapshot.status_code == 201
    (key,) = (await user.client.get("/v1/api-keys", headers=user.bearer)).json()
    stranger = await faulty.team()
    targets = {"{name}": "private", "/api-keys/{id}": f"/api-keys/{key['id']}", "{id}": id}
    paths = (await user.client.get("/openapi.json")).json()["paths"]
    tried = 0
    for path, item in paths.items():
        if "{" not in path or path.endswith(_SOCKETS):
            continue
        for pattern, value in targets.items():
            path = path.replace(pattern, value)
        path = path.replace("{process}", "1")
        for method in item.keys() - {"parameters"}:
            for credential in (stranger.bearer, {"X-API-Key": stranger.key}):
                answer = await _request(faulty, method, path, credential)
                key_route_without_token = "api-keys" in path and "X-API-Key" in credential
                expected = 401 if key_route_without_token else 404
                assert answer.status_code == expected, (method, path)
                tried += 1
    assert tried >= 36
    body = {"sandbox_id": id, "name": "stolen"}
    assert (await stranger.client.post("/v1/snapshots", json=body)).status_code == 404
    body = {"template": "private"}
    assert (await stranger.client.post("/v1/sandboxes", json=body)).status_code == 404
    assert (await stranger.client.get("/v1/sandboxes")).json() == []
    assert (await user.client.get(f"/v1/sandboxes/{id}")).json()["status"] == "running"
    assert (await user.client.get("/v1/sandboxes")).status_code == 200
    names = [each["name"] for each in (await user.client.get("/v1/snapshots")).json()]
    assert "private" in names


async def _request(
    server: Server, method: str, path: str, headers: dict[str, str]
) -> httpx2.Response:
    client = server.client()
    if path.endswith("/write"):
        parts = {"path": (None, b"/x"), "file": ("x", b"content")}
        return await client.request(method, path, files=parts, headers=headers)
    if path.endswith("/archive"):
        return await client.request(method, path, params={"path": "/x"}, headers=headers)
    body = {"cmd": "true", "path": "/x", "snapshot": "s", "value": "v"}
    return await client.request(method, path, json=body, headers=headers)
