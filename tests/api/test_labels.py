"""Labels of sandboxes, the filters of their list, and changes of what callers say of them."""

from collections.abc import Iterable
from random import Random

import pytest

from support.api_server import Server, Team
from support.host_double import HostDouble
from wrenn_sandbox.ids import SandboxId

_LABELS = {"run": "42", "ümläut.and = sign": "a&b", "empty": "", "\U0001f99c": "\U0001f99c"}


def _noise(seed: int, length: int) -> str:
    """Characters of four bytes that databases cannot compress."""
    return "".join(map(chr, Random(seed).choices(range(0x10000, 0x11_0000), k=length)))


_LARGEST = {
    **{_noise(n, 128): _noise(-n, 512) for n in range(3)},
    **{str(n): "" for n in range(29)},
}


async def _create(team: Team, **body: object) -> str:
    answer = await team.client.post("/v1/sandboxes", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def _list(team: Team, *query: tuple[str, str]) -> list[str]:
    answer = await team.client.get("/v1/sandboxes", params=query)
    assert answer.status_code == 200, answer.text
    return [each["id"] for each in answer.json()]


@pytest.mark.parametrize("labels", [_LABELS, _LARGEST, {}], ids=["some", "largest", "none"])
async def test_labels_are_in_every_shape_of_a_sandbox(
    faulty: Server, user: Team, labels: dict[str, str]
) -> None:
    made = (await user.client.post("/v1/sandboxes", json={"metadata": labels})).json()
    path = f"/v1/sandboxes/{made['id']}"
    shapes = [made, (await user.client.get(path)).json()]
    shapes += (await user.client.get("/v1/sandboxes")).json()
    for action in ("pause", "resume"):
        shapes.append((await user.client.post(f"{path}/{action}")).json())
    assert [each["metadata"] for each in shapes] == [labels] * 5
    for key, value in labels.items():
        assert await _list(user, (f"metadata.{key}", value)) == [made["id"]]


_BAD: list[object] = [
    {str(n): "" for n in range(33)},
    {str(n): "v" * 512 for n in range(16)},
    {"": "x"},
    {"k" * 129: "x"},
    {"k": "v" * 513},
    {"k": 1},
    {"k": None},
    {"k": "\0"},
    {"\0": "v"},
    ["k"],
    "k=v",
]


async def test_labels_that_are_not_acceptable(faulty: Server, user: Team) -> None:
    id = await _create(user)
    for labels in _BAD:
        for method, path in (("POST", "/v1/sandboxes"), ("PATCH", f"/v1/sandboxes/{id}")):
            answer = await user.client.request(method, path, json={"metadata": labels})
            assert answer.status_code == 400, labels
            assert answer.json()["error"]["message"].startswith("metadata")
    assert await _list(user) == [id]


async def test_a_list_shows_what_has_all_the_labels(faulty: Server, user: Team) -> None:
    both = await _create(user, metadata={"app": "web", "run": "1"})
    web = await _create(user, metadata={"app": "web", "run": "2"})
    await _create(user, metadata={"run": "web", "app": "1"})
    assert await _list(user, ("metadata.app", "web")) == [web, both]
    assert await _list(user, ("metadata.app", "web"), ("metadata.run", "1")) == [both]
    assert await _list(user, ("metadata.app", "web"), ("metadata.app", "1")) == []
    assert await _list(user, ("metadata.app", "WEB")) == []
    assert await _list(user, ("metadata.", "web")) == []
    assert await _list(user, ("metadata.app", "v" * 600)) == []


async def test_another_teams_labels_match_nothing(faulty: Server, user: Team) -> None:
    await _create(user, metadata={"app": "web"})
    assert await _list(await faulty.team(), ("metadata.app", "web")) == []


async def test_a_list_by_status_and_template(faulty: Server, user: Team, host: HostDouble) -> None:
    source, paused, stopped, running = [await _create(user) for _ in range(4)]
    await user.client.post(f"/v1/sandboxes/{paused}/pause")
    await user.client.delete(f"/v1/sandboxes/{stopped}")
    await user.client.post("/v1/snapshots", json={"sandbox_id": source, "name": "mine"})
    copy = await _create(user, template="mine")
    assert await _list(user, ("status", "running")) == [copy, running]
    assert await _list(user, ("status", "paused"), ("status", "running")) == [copy, running, paused]
    assert await _list(user, ("status", "error")) == []
    assert await _list(user, ("template", "mine")) == [copy]
    assert await _list(user, ("template", "mine"), ("status", "stopped")) == []
    assert await _list(user, ("template", "minimal"), ("status", "paused")) == [paused]


_BAD_FILTERS: list[Iterable[tuple[str, str]]] = [
    [("status", "asleep")],
    [("status", "running"), ("status", "")],
    [("template", "\0")],
    [("metadata.\0", "x")],
    [("metadata.x", "\0")],
    [(f"metadata.{n}", "x") for n in range(33)],
]


async def test_filters_that_are_not_acceptable(faulty: Server, user: Team) -> None:
    for query in _BAD_FILTERS:
        answer = await user.client.get("/v1/sandboxes", params=list(query))
        assert answer.status_code == 400, query
        assert answer.json()["error"]["code"] == "invalid_request"


async def test_pages_of_a_filtered_list_have_each_match_once(faulty: Server, user: Team) -> None:
    made = [await _create(user, metadata={"odd": str(n % 2), "all": "é &"}) for n in range(9)]
    await user.client.post(f"/v1/sandboxes/{made[5]}/pause")
    url = (
        "/v1/sandboxes?limit=2&metadata.odd=1&metadata.all=%C3%A9+%26&status=running&status=paused"
    )
    pages = []
    while url:
        answer = await user.client.get(url)
        pages.append([each["id"] for each in answer.json()])
        url = answer.headers.get("link", "").partition(">")[0].removeprefix("<")
    assert pages == [[made[7], made[5]], [made[3], made[1]]]


async def test_a_change_replaces_all_labels_and_leaves_what_is_not_given(
    faulty: Server, user: Team
) -> None:
    id = await _create(user, metadata={"a": "1", "b": "2"}, timeout_sec=60)
    path = f"/v1/sandboxes/{id}"
    for body in (b"", b"{}", b'{"metadata": null, "timeout_sec": null}'):
        kept = (await user.client.patch(path, content=body)).json()
        assert (kept["metadata"], kept["timeout_sec"]) == ({"a": "1", "b": "2"}, 60)
    changed = (await user.client.patch(path, json={"metadata": {"b": "3"}})).json()
    assert (changed["metadata"], changed["timeout_sec"]) == ({"b": "3"}, 60)
    assert (await user.client.get(path)).json() == changed
    assert await _list(user, ("metadata.a", "1")) == await _list(user, ("metadata.b", "2")) == []
    assert await _list(user, ("metadata.b", "3")) == [id]
    assert (await user.client.patch(path, json={"timeout_sec": 5})).json()["timeout_sec"] == 5
    assert (await user.client.patch(path, json={"metadata": {}})).json()["metadata"] == {}
    assert await _list(user, ("metadata.b", "3")) == []
    events = (await user.client.get(f"{path}/events")).json()
    assert [each.get("reason") for each in events if each["event"] == "updated"] == [
        "metadata",
        "timeout_sec",
        "metadata",
    ]


async def test_a_sandbox_that_has_ended_cannot_be_changed(faulty: Server, user: Team) -> None:
    id = await _create(user, metadata={"a": "1"})
    await user.client.delete(f"/v1/sandboxes/{id}")
    answer = await user.client.patch(f"/v1/sandboxes/{id}", json={"metadata": {}})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "invalid_state"
    assert await _list(user, ("metadata.a", "1")) == [id]


async def test_a_change_of_labels_ends_no_silence(faulty: Server, user: Team) -> None:
    id = SandboxId(await _create(user))
    silences, now = faulty.plane.store.silences, faulty.plane.activity._clock()
    await silences.begin(id, "guest not responding", "health", now)
    await user.client.patch(f"/v1/sandboxes/{id}", json={"metadata": {"a": "1"}})
    assert list(await silences.all()) == [id]


@pytest.mark.parametrize("timeout_sec", [-1, 86_401, "1", 1.5])
async def test_a_timeout_that_is_not_acceptable_changes_nothing(
    faulty: Server, user: Team, timeout_sec: object
) -> None:
    id = await _create(user, timeout_sec=60)
    body = {"timeout_sec": timeout_sec, "metadata": {"a": "1"}}
    answer = await user.client.patch(f"/v1/sandboxes/{id}", json=body)
    assert answer.status_code == 400
    assert "timeout_sec" in answer.json()["error"]["message"]
    (sandbox,) = (await user.client.get("/v1/sandboxes")).json()
    assert (sandbox["timeout_sec"], sandbox["metadata"]) == (60, {})
