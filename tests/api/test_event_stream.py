"""Events as they happen, and looked up later."""

import asyncio
import json
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import httpx2
import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from support.api_server import FakeClock, Server, Team, eventually, serve
from support.host_double import HostDouble
from support.listening import edge
from support.rows import change, count_rows
from wrenn_sandbox.control.api import event_stream
from wrenn_sandbox.control.store import team_events
from wrenn_sandbox.control.store.administration import administration
from wrenn_sandbox.errors import NoCapacity
from wrenn_sandbox.ids import KeyId, TeamId
from wrenn_sandbox.model.events import KEPT_FOR
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import Settings

Json = dict[str, object]
_CREATED = ["sandbox.create", "sandbox.start", "sandbox.started"]


class Stream:
    """What comes over one stream of events."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    async def block(self) -> list[str]:
        """The lines of the next message or comment; raises `StopAsyncIteration` at the end."""
        found: list[str] = []
        async with asyncio.timeout(patience(10)):
            while line := await anext(self._lines):
                found.append(line)
        return found

    async def events(self, number: int) -> list[Json]:
        found: list[Json] = []
        while len(found) < number:
            lines = await self.block()
            if lines[-1].startswith("data: "):
                event = json.loads(lines[-1].removeprefix("data: "))
                assert lines == [f"id: {event['id']}", lines[-1]]
                found.append(event)
        return found

    async def types(self, number: int) -> list[str]:
        return [str(each["type"]) for each in await self.events(number)]

    async def rest(self) -> list[list[str]]:
        """Everything up to the end."""
        found = []
        while True:
            try:
                found.append(await self.block())
            except StopAsyncIteration:
                return found


@asynccontextmanager
async def _stream(
    url: str, headers: dict[str, str], after: str | None = None
) -> AsyncIterator[Stream]:
    if after is not None:
        headers = {**headers, "Last-Event-ID": after}
    async with (
        httpx2.AsyncClient(base_url=url, timeout=patience(20)) as client,
        client.stream("GET", "/v1/events/stream", headers=headers) as response,
    ):
        yield Stream(response)


@pytest.fixture
async def url(faulty: Server) -> AsyncIterator[str]:
    async with edge(faulty.app, faulty.settings) as server:
        yield server.url


def _data(event: Json) -> Json:
    found = event["data"]
    assert isinstance(found, dict)
    return found


def _key(team: Team) -> dict[str, str]:
    return {"X-API-Key": team.key}


async def _create(team: Team) -> str:
    answer = await team.client.post("/v1/sandboxes", json={})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def test_everything_that_happens_is_told(
    faulty: Server, user: Team, host: HostDouble, url: str
) -> None:
    async with _stream(url, _key(user)) as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert await stream.block() == ["retry: 2000", "id: 1"]
        id = await _create(user)
        created = await stream.events(3)
        assert [each["type"] for each in created] == _CREATED
        assert [each["id"] for each in created] == ["2", "3", "4"]
        assert created[2]["data"] == {
            "sandbox_id": id,
            "from": "starting",
            "to": "running",
            "actor": "user",
        }
        assert {each["team_id"] for each in created} == {user.team_id}
        await user.client.put(f"/v1/sandboxes/{id}/network", json={"internet": False})
        assert await stream.types(1) == ["sandbox.network"]
        body = {"sandbox_id": id, "name": "mine"}
        assert (await user.client.post("/v1/snapshots", json=body)).status_code == 201
        snapshot = ["sandbox.snapshot", "sandbox.snapshotted", "snapshot.created"]
        assert await stream.types(3) == snapshot
        await user.client.delete("/v1/snapshots/mine")
        (deleted,) = await stream.events(1)
        assert (deleted["type"], deleted["data"]) == (
            "snapshot.deleted",
            {"name": "mine", "actor": "user"},
        )
        key = await user.client.post("/v1/api-keys", json={"name": "k"}, headers=user.bearer)
        await user.client.delete(f"/v1/api-keys/{key.json()['id']}", headers=user.bearer)
        made, gone = await stream.events(2)
        assert [made["type"], gone["type"]] == ["api_key.created", "api_key.deleted"]
        told = {"api_key_id": key.json()["id"], "name": "k", "actor": "user"}
        assert made["data"] == gone["data"] == told
        host.fail["create"] = NoCapacity("The host is full")
        assert (await user.client.post("/v1/sandboxes", json={})).status_code == 503
        assert await stream.types(2) == _CREATED[:2]
        (refused,) = await stream.events(1)
        assert refused["type"] == "sandbox.refused"
        assert _data(refused)["reason"] == "The host is full"
    page = (await user.client.get("/v1/events", params={"limit": 2})).json()
    assert [each["type"] for each in page] == ["sandbox.refused", "sandbox.start"]


async def test_a_stream_goes_on_where_another_ended(settings: Settings, host: HostDouble) -> None:
    """Also over a restart of the server, and also for what is gone meanwhile."""
    async with serve(settings, host) as server, edge(server.app, settings) as first:
        team = await server.team()
        async with _stream(first.url, _key(team)) as stream:
            id = await _create(team)
            last = str((await stream.events(3))[-1]["id"])
        await team.client.delete(f"/v1/sandboxes/{id}")
    await change(settings, "DELETE FROM sandboxes")
    async with serve(settings, host) as server, edge(server.app, settings) as second:
        async with _stream(second.url, _key(team), after=last) as stream:
            assert await stream.types(2) == ["sandbox.delete", "sandbox.deleted"]
        async with httpx2.AsyncClient(base_url=second.url, headers=_key(team)) as client:
            path = f"/v1/events/stream?after={last}"
            async with client.stream("GET", path) as response:
                assert await Stream(response).types(2) == ["sandbox.delete", "sandbox.deleted"]


async def test_what_is_committed_late_is_not_lost(
    faulty: Server, user: Team, host: HostDouble, url: str
) -> None:
    """Many transactions of a team at once: each number comes once and in order."""
    async with _stream(url, _key(user)) as stream:
        ids = await asyncio.gather(*(_create(user) for _ in range(8)))
        deleted = (user.client.delete(f"/v1/sandboxes/{id}") for id in ids)
        await asyncio.gather(*deleted)
        events = await stream.events(8 * 5)
    assert [each["id"] for each in events] == [str(number) for number in range(2, 42)]


async def test_no_number_is_seen_before_a_lower_one(faulty: Server, user: Team) -> None:
    """While one transaction has taken a number, no other one gets the next."""
    store = faulty.plane.store
    events = store.team(TeamId(user.team_id)).events
    before = await events.last()
    held, release = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        async with store._database.write() as connection:
            await _record(connection, user, "first")
            held.set()
            await release.wait()

    async def quick() -> None:
        async with store._database.write() as connection:
            await _record(connection, user, "second")

    tasks = [faulty.start(slow())]
    await held.wait()
    tasks.append(faulty.start(quick()))
    await asyncio.sleep(0.1)
    assert await events.after(before, 10) == []
    release.set()
    await asyncio.gather(*tasks)
    found = await events.after(before, 10)
    assert [(each.number, each.data) for each in found] == [
        (before + 1, '{"name":"first"}'),
        (before + 2, '{"name":"second"}'),
    ]


async def _record(connection: AsyncConnection, user: Team, name: str) -> None:
    await team_events.record_event(
        connection, TeamId(user.team_id), "snapshot.deleted", datetime.now(UTC), {"name": name}
    )


async def test_another_process_is_noticed(faulty: Server, user: Team, url: str) -> None:
    """What an operator does beside the server is told a moment later."""
    keys = (await user.client.get("/v1/api-keys", headers=user.bearer)).json()
    async with (
        _stream(url, user.bearer) as stream,
        administration(faulty.settings.sql_url, "root") as admin,
    ):
        await stream.block()
        await admin.revoke_key(KeyId(keys[0]["id"]), datetime.now(UTC))
        (event,) = await stream.events(1)
    assert event["type"] == "api_key.deleted"
    assert _data(event)["actor"] == "admin"


async def test_a_team_is_told_of_its_own_alone(faulty: Server, user: Team, url: str) -> None:
    other = await faulty.team()
    async with _stream(url, _key(user)) as stream:
        await stream.block()
        await _create(other)
        id = await _create(user)
        events = await stream.events(3)
        assert {_data(each)["sandbox_id"] for each in events} == {id}
    listed = (await other.client.get("/v1/events")).json()
    assert {each["team_id"] for each in listed} == {other.team_id}


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "9" * 19, "٣"])
async def test_an_id_that_is_none_is_refused(user: Team, after: str) -> None:
    answer = await user.client.get("/v1/events/stream", params={"after": after})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


async def test_an_id_whose_successors_are_gone_is_refused(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> None:
    async with serve(settings, host, clock) as server, edge(server.app, settings) as listener:
        team = await server.team()
        await _create(team)
        clock.advance((KEPT_FOR + timedelta(minutes=1)).total_seconds())
        await _create(team)
        await server.plane.store.events.remove_old(clock() - KEPT_FOR)
        listed = (await team.client.get("/v1/events")).json()
        assert [each["id"] for each in listed] == ["7", "6", "5"]
        for after, status in (("0", 410), ("3", 410), ("8", 410), ("99", 410)):
            answer = await team.client.get("/v1/events/stream", params={"after": after})
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, "gone")
        async with _stream(listener.url, _key(team), after="4") as stream:
            assert await stream.types(3) == _CREATED
        async with _stream(listener.url, _key(team), after="7") as stream:
            assert await stream.block() == ["retry: 2000", "id: 7"]


async def test_only_the_last_events_are_kept(
    faulty: Server, user: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team_events, "KEPT", 5)
    monkeypatch.setattr(team_events, "_TRIM_EVERY", 10)
    for _ in range(3):
        await _create(user)
    assert await count_rows(faulty.settings, "team_events") == [5]


async def test_a_deleted_key_ends_its_streams(faulty: Server, user: Team, url: str) -> None:
    keys = (await user.client.get("/v1/api-keys", headers=user.bearer)).json()
    async with _stream(url, _key(user)) as stream, _stream(url, user.bearer) as other:
        await stream.block()
        await user.client.delete(f"/v1/api-keys/{keys[0]['id']}", headers=user.bearer)
        await stream.rest()
        assert await other.types(1) == ["api_key.deleted"]


async def test_a_disabled_user_ends_their_streams(faulty: Server, user: Team, url: str) -> None:
    async with _stream(url, user.bearer) as stream:
        await stream.block()
        await change(faulty.settings, "UPDATE users SET disabled_at = created_at")
        await stream.rest()


async def test_a_stopping_server_ends_streams_at_once(faulty: Server, user: Team) -> None:
    async with (
        edge(faulty.app, faulty.settings) as server,
        _stream(server.url, _key(user)) as stream,
    ):
        await stream.block()
        server.should_exit = True
        assert await stream.rest() == []


async def test_idle_streams_are_kept_alive(
    faulty: Server, user: Team, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "KEEPALIVE_SEC", 0.05)
    async with _stream(url, _key(user)) as stream:
        await stream.block()
        assert await stream.block() == [": keepalive"]
        assert await stream.block() == [": keepalive"]


async def test_streams_at_once_are_bounded(
    faulty: Server, user: Team, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "wrenn_sandbox.control.service.events"
    monkeypatch.setattr(f"{module}.EVENT_STREAMS_PER_CALLER", 1)
    monkeypatch.setattr(f"{module}.EVENT_STREAMS_PER_TEAM", 2)
    async with _stream(url, _key(user)) as stream, _stream(url, user.bearer) as other:
        await stream.block()
        await other.block()
        refused = await user.client.get("/v1/events/stream")
        assert (refused.status_code, refused.json()["error"]["limit"]) == (
            429,
            "event_streams_per_caller",
        )
        key = await user.client.post("/v1/api-keys", json={}, headers=user.bearer)
        headers = {"X-API-Key": key.json()["key"]}
        refused = await user.client.get("/v1/events/stream", headers=headers)
        assert refused.json()["error"]["limit"] == "event_streams_per_team"
    await eventually(lambda: not faulty.plane.events._tails)
    async with _stream(url, _key(user)) as stream:
        await stream.block()


async def test_a_slow_reader_is_cut_off(
    faulty: Server, user: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept for one who does not read, and they are not waited for."""
    monkeypatch.setattr(event_stream, "SLOW_SEC", 0.1)
    sent: list[object] = []

    async def receive() -> dict[str, object]:
        if sent:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, object]) -> None:
        sent.append(message["type"])
        if message.get("body"):
            await asyncio.Event().wait()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/v1/events/stream",
        "raw_path": b"/v1/events/stream",
        "query_string": b"",
        "headers": [(b"x-api-key", user.key.encode())],
        "server": ("wrenn.test", 80),
        "client": ("192.0.2.1", 1),
    }
    async with asyncio.timeout(patience(10)):
        await faulty.app(scope, receive, send)
    assert sent == ["http.response.start", "http.response.body"], "the answer has no end"
    assert not faulty.plane.events._tails


async def test_a_head_alone_is_answered(user: Team) -> None:
    answer = await user.client.head("/v1/events/stream")
    assert (answer.status_code, answer.content) == (200, b"")
