"""Requests with an `Idempotency-Key`, which may be repeated and are done once."""

import asyncio
import hashlib

import httpx2
import pytest
from sqlalchemy import func, select, text

from support.api_server import FakeClock, Server, Team, eventually, serve
from support.host_double import HostDouble
from wrenn_sandbox.control.store import idempotency
from wrenn_sandbox.control.store.tables import idempotency_keys
from wrenn_sandbox.errors import HostFailure, NoCapacity
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.settings import Settings

_DAY = 24 * 3600
_BODY: dict[str, object] = {"metadata": {"job": "1"}, "envs": {"TOKEN": "s3cr3t"}}


def _header(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


async def _create(team: Team, key: str, **body: object) -> httpx2.Response:
    return await team.client.post("/v1/sandboxes", json=body or _BODY, headers=_header(key))


async def _number(team: Team) -> int:
    return len((await team.client.get("/v1/sandboxes")).json())


async def _rows(server: Server) -> int:
    async with server.plane.store._database.read() as connection:
        query = select(func.count()).select_from(idempotency_keys)
        return int(await connection.scalar(query) or 0)


async def test_a_repeated_create_gives_the_first_answer(faulty: Server, user: Team) -> None:
    first = await _create(user, "a key: ~!")
    assert (first.status_code, "idempotency-replayed" in first.headers) == (201, False)
    await user.client.post(f"/v1/sandboxes/{first.json()['id']}/pause")
    for credential in ({}, user.bearer):
        headers = {**_header("a key: ~!"), **credential}
        again = await user.client.post("/v1/sandboxes", json=_BODY, headers=headers)
        assert (again.status_code, again.content) == (201, first.content)
        assert again.headers["idempotency-replayed"] == "true"
    assert await _number(user) == 1
    assert (await _create(user, "another key")).json()["id"] != first.json()["id"]
    assert await _number(user) == 2


async def test_a_key_with_another_body_is_refused(faulty: Server, user: Team) -> None:
    first = await _create(user, "k")
    for body in ({"metadata": {"job": "2"}}, {**_BODY, "unknown": 1}):
        answer = await _create(user, "k", **body)
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "idempotency_key_reused"
    assert (await _create(user, "k")).content == first.content
    assert await _number(user) == 1


async def test_a_key_means_something_to_its_team_and_operation_alone(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    other = await faulty.team()
    mine, theirs = await _create(user, "k"), await _create(other, "k")
    assert mine.json()["id"] != theirs.json()["id"]
    body = {"sandbox_id": mine.json()["id"], "name": "t"}
    for replayed in (None, "true"):
        made = await user.client.post("/v1/snapshots", json=body, headers=_header("k"))
        assert (made.status_code, made.json()["name"]) == (201, "t"), made.text
        assert made.headers.get("idempotency-replayed") == replayed
    assert [call for call, _ in host.calls].count("snapshot") == 1


async def test_copies_may_be_asked_for_again(faulty: Server, user: Team, host: HostDouble) -> None:
    id = (await _create(user, "k")).json()["id"]
    for path, body in (("snapshots", {"name": "good"}), ("fork", {"count": 2})):
        url = f"/v1/sandboxes/{id}/{path}"
        first, again = [
            await user.client.post(url, json=body, headers=_header("k")) for _ in range(2)
        ]
        assert (first.status_code, again.content) == (201, first.content)
        assert again.headers["idempotency-replayed"] == "true"
    assert [call for call, _ in host.calls].count("checkpoint") == 2
    assert await _number(user) == 3


async def test_forks_of_which_none_was_made_are_not_kept(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    id = (await _create(user, "k")).json()["id"]

    async def fork() -> httpx2.Response:
        url = f"/v1/sandboxes/{id}/fork"
        return await user.client.post(url, json={"count": 2}, headers=_header("k"))

    host.fail["create"] = NoCapacity("The host is full")
    first = await fork()
    assert first.status_code == 201
    assert [each["error"]["code"] for each in first.json()] == ["no_capacity"] * 2
    del host.fail["create"]
    second, third = await fork(), await fork()
    assert all("sandbox" in each for each in second.json())
    assert "idempotency-replayed" not in second.headers
    assert (third.content, third.headers["idempotency-replayed"]) == (second.content, "true")


async def test_what_is_behind_the_question_mark_belongs_to_the_request(
    faulty: Server, user: Team
) -> None:
    ids = [(await user.client.post("/v1/sandboxes")).json()["id"] for _ in range(2)]
    body = {"sandbox_id": ids[0], "name": "t"}
    url = "/v1/snapshots"
    assert (await user.client.post(url, json=body, headers=_header("k"))).status_code == 201
    answer = await user.client.post(f"{url}?overwrite=true", json=body, headers=_header("k"))
    assert answer.json()["error"]["code"] == "idempotency_key_reused"


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\tin it", "\u00fc"])
async def test_keys_that_are_not_acceptable(faulty: Server, user: Team, key: str) -> None:
    headers = {"Idempotency-Key": key.encode("latin-1")}
    answer = await user.client.post("/v1/sandboxes", headers=headers)  # type: ignore[arg-type]
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("Idempotency-Key: ")
    assert await _number(user) == 0


async def test_the_longest_key(faulty: Server, user: Team) -> None:
    key = "~" * 255
    assert (await _create(user, key)).content == (await _create(user, key)).content


async def test_a_failure_is_not_kept(faulty: Server, user: Team, host: HostDouble) -> None:
    host.fail["create"] = HostFailure("No machine")
    assert (await _create(user, "k")).status_code == 502
    host.fail["create"] = NoCapacity("The host is full")
    assert (await _create(user, "k")).status_code == 503
    assert (await _create(user, "l", template="unknown")).status_code == 404
    assert await _rows(faulty) == 0
    del host.fail["create"]
    made = await _create(user, "k")
    assert (made.status_code, "idempotency-replayed" in made.headers) == (201, False)
    assert (await _create(user, "k")).content == made.content


async def test_requests_that_come_together_share_one_answer(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    gate = host.hold("create")
    first = faulty.start(_create(user, "k"))
    await gate.arrived.wait()
    second = faulty.start(_create(user, "k"))
    other = await _create(user, "k", metadata={"job": "2"})
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    gate.opened.set()
    assert (await first).content == (await second).content
    assert (await second).headers["idempotency-replayed"] == "true"
    assert await _number(user) == 1


async def test_the_answer_to_a_client_that_hung_up_is_there_for_its_next_try(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    gate = host.hold("create")
    first = asyncio.create_task(_create(user, "k"))
    await gate.arrived.wait()
    first.cancel()
    await asyncio.wait([first])
    gate.opened.set()
    again = await _create(user, "k")
    assert (again.status_code, again.json()["status"]) == (201, "running")
    assert await _number(user) == 1


async def test_answers_are_kept_for_a_day_and_over_a_restart(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> None:
    async with serve(settings, host, clock) as server:
        user = await server.team()
        first = await _create(user, "k")
        assert await _rows(server) == 1
    clock.advance(_DAY - 1)
    async with serve(settings, host, clock) as server:
        user.client = server.client({"X-API-Key": user.key})
        assert (await _create(user, "k")).content == first.content
        clock.advance(2)
        second = await _create(user, "k")
        assert second.json()["id"] != first.json()["id"]
        clock.advance(_DAY + 1)
        await server.plane.reconciler.sweep()
        assert await _rows(server) == 0


async def _cut_off(server: Server, request: "asyncio.Task[httpx2.Response]") -> None:
    """Let a request with a key die as it does with the server; what it began goes on."""
    ((_, task),) = server.plane.idempotency._under_way.values()
    task.cancel()
    await asyncio.wait([request])


async def test_a_sandbox_that_was_made_before_the_server_died_is_the_answer(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    gate = host.hold("create")
    request = faulty.start(_create(user, "k"))
    await gate.arrived.wait()
    await _cut_off(faulty, request)
    gate.opened.set()
    (id,) = host.phases
    await faulty.plane.operations.wait_for_others(id)
    for _ in range(2):
        again = await _create(user, "k")
        assert (again.status_code, again.json()["id"]) == (201, id)
        assert again.headers["idempotency-replayed"] == "true"
        await user.client.delete(f"/v1/sandboxes/{id}")
    assert await _number(user) == 1


async def test_a_request_that_died_with_the_server_locks_nobody_out(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    gate = host.hold("create")
    request = faulty.start(_create(user, "k"))
    await gate.arrived.wait()
    (first,) = host.phases
    await _cut_off(faulty, request)
    early = await _create(user, "k")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "conflict")
    assert early.headers["retry-after"] == "1"
    host.fail["create"] = HostFailure("the server stopped while the sandbox was starting")
    del host.gates["create"]
    gate.opened.set()
    await faulty.plane.operations.wait_for_others(first)
    del host.fail["create"]
    again = await _create(user, "k")
    assert again.status_code == 201
    assert again.json()["id"] != first
    assert (await _create(user, "k")).content == again.content


async def test_a_template_that_was_made_before_the_server_died_is_the_answer(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    id = (await user.client.post("/v1/sandboxes")).json()["id"]
    headers = _header("k")
    gate = host.hold("snapshot")
    url, body = "/v1/snapshots", {"sandbox_id": id, "name": "t"}
    request = faulty.start(user.client.post(url, json=body, headers=headers))
    await gate.arrived.wait()
    await _cut_off(faulty, request)
    early = await user.client.post(url, json=body, headers=headers)
    assert (early.status_code, early.json()["error"]["code"]) == (409, "conflict")
    gate.opened.set()
    await faulty.plane.operations.wait_for_others(SandboxId(id))
    again = await user.client.post(url, json=body, headers=headers)
    assert (again.status_code, again.json()["name"]) == (201, "t")
    assert again.headers["idempotency-replayed"] == "true"


async def test_no_stored_answer_holds_a_secret(faulty: Server, user: Team) -> None:
    await _create(user, "k")
    async with faulty.plane.store._database.read() as connection:
        rows = await connection.execute(text("SELECT * FROM idempotency_keys"))
        stored = str([tuple(row) for row in rows])
    assert '"job":"1"' in stored
    for secret in ("s3cr3t", "TOKEN", user.key, hashlib.sha256(b"s3cr3t").hexdigest()):
        assert secret not in stored


async def test_the_newest_keys_of_each_team_are_remembered(
    settings: Settings, host: HostDouble, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "IDEMPOTENCY_KEYS_KEPT", 2)
    async with serve(settings, host, clock) as server:
        user, other = await server.team(), await server.team()
        theirs = await _create(other, "a")
        answers = {}
        for key in "abc":
            clock.advance(1)
            answers[key] = await _create(user, key)
        assert await _rows(server) == 3
        for key in "bc":
            assert (await _create(user, key)).content == answers[key].content
        assert (await _create(other, "a")).content == theirs.content
        assert (await _create(user, "a")).content != answers["a"].content


async def test_a_stopping_server_waits_for_answers_to_be_kept(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> None:
    gate = host.hold("create")
    async with serve(settings, host, clock) as server:
        user = await server.team()
        request = asyncio.create_task(_create(user, "k"))
        opening = asyncio.create_task(_open_when_closing(server, gate.opened))
        await gate.arrived.wait()
    await asyncio.gather(request, opening, return_exceptions=True)
    async with serve(settings, host, clock) as server:
        user.client = server.client({"X-API-Key": user.key})
        again = await _create(user, "k")
        assert again.headers["idempotency-replayed"] == "true"
        assert await _number(user) == 1


async def _open_when_closing(server: Server, opened: asyncio.Event) -> None:
    await eventually(lambda: server.plane.operations._closed)
    opened.set()
