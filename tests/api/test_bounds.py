"""Whatever a caller can make grow has an end."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from support.api_server import FakeClock, Server, Team, eventually, serve
from support.host_double import HostDouble
from support.listening import edge
from wrenn_sandbox.control.service.calls import ConcurrencyLimiter, checked_command, output_limit
from wrenn_sandbox.control.store import events as event_store
from wrenn_sandbox.control.store import sandboxes
from wrenn_sandbox.errors import InvalidRequest, QuotaExceeded
from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.model.limits import COMMAND_BYTES
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Command, CommandResult

pytestmark = pytest.mark.slow


@pytest.fixture
async def busy(settings: Settings, host: HostDouble) -> AsyncIterator[Server]:
    """A server with room for a few calls at once."""
    few = {"calls_per_sandbox": 3, "calls_per_team": 4}
    async with serve(settings.model_copy(update=few), host) as server:
        yield server


async def _create(team: Team) -> str:
    answer = await team.client.post("/v1/sandboxes", json={})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.mark.parametrize("database_url", [None])
async def test_the_number_of_calls_at_once_is_bounded(busy: Server, host: HostDouble) -> None:
    team, stranger = await busy.team(), await busy.team()
    first, second, foreign = await _create(team), await _create(team), await _create(stranger)
    gate = host.hold("exec")

    def run(of: Team, id: str) -> "asyncio.Task[object]":
        return busy.start(of.client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "true"}))

    async def refusal(id: str) -> tuple[int, str]:
        for verb, body in (("exec", {"cmd": "true"}), ("files/list", {"path": "/"})):
            answer = await team.client.post(f"/v1/sandboxes/{id}/{verb}", json=body)
            assert answer.headers["retry-after"] == "1"
        metrics = await team.client.get(f"/v1/sandboxes/{id}/metrics")
        assert metrics.json()["error"] == answer.json()["error"]
        return answer.status_code, answer.json()["error"]["limit"]

    under_way = [run(team, first) for _ in range(3)]
    while len([each for each in host.calls if each == ("exec", first)]) < 3:
        host.called["exec"].clear()
        await host.called["exec"].wait()
    assert await refusal(first) == (429, "calls_per_sandbox")
    under_way.append(run(team, second))
    while ("exec", second) not in host.calls:
        host.called["exec"].clear()
        await host.called["exec"].wait()
    assert await refusal(second) == (429, "calls_per_team")
    under_way.append(run(stranger, foreign))
    for verb in ("pause", "resume"):
        assert (await team.client.post(f"/v1/sandboxes/{second}/{verb}")).status_code == 200
    gate.opened.set()
    await asyncio.gather(*under_way)
    assert (await team.client.get(f"/v1/sandboxes/{first}/metrics")).status_code == 200
    assert (await team.client.get(f"/v1/sandboxes/{second}/processes")).status_code == 200


@pytest.mark.parametrize("database_url", [None])
@pytest.mark.parametrize("timed_out", [False, True])
async def test_an_answer_that_nobody_reads_is_a_call_still(
    busy: Server, host: HostDouble, timed_out: bool
) -> None:
    """Else one client could have any number of outputs kept for it."""
    team = await busy.team()
    id = await _create(team)
    host.answer = lambda _: CommandResult(
        exit_code=0, stdout=bytes(10 << 20), stderr=b"", duration_ms=1, timed_out=timed_out
    )
    calls = busy.plane.guests._calls._under_way
    async with edge(busy.app, busy.settings) as server:
        request = f"POST /v1/sandboxes/{id}/exec HTTP/1.1\r\nHost: x\r\nX-API-Key: {team.key}\r\n"
        body = 'Content-Type: application/json\r\nContent-Length: 12\r\n\r\n{"cmd": "c"}'
        clients = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
        for reader, writer in clients:
            writer.write((request + "Connection: close\r\n" + body).encode())
            await reader.readuntil(b"\r\n")
        assert calls[id] == 3
        refused = await team.client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "c"})
        assert (refused.status_code, refused.json()["error"]["limit"]) == (429, "calls_per_sandbox")
        (reader, _), (_, hasty), (_, other) = clients
        rest = await reader.read()
        assert rest.endswith(b"}")
        assert rest.count(b"\\u0000") == 10 << 20
        await eventually(lambda: calls[id] == 2)
        hasty.close()
        other.transport.abort()
        await eventually(lambda: not calls)
        for _, writer in clients:
            writer.close()


def test_ended_calls_leave_nothing_in_memory() -> None:
    calls = ConcurrencyLimiter(per_sandbox=1, per_team=2)
    team, one, two = TeamId("team-a"), SandboxId("sb-one"), SandboxId("sb-two")
    with calls.acquire(team, one), calls.acquire(team, two):
        assert calls.under_way(team) == 2
        with pytest.raises(QuotaExceeded), calls.acquire(team, one):
            pass
    assert not calls._under_way


def test_outputs_of_many_commands_share_their_room() -> None:
    assert [output_limit(1600, calls) for calls in (1, 16, 32, 1024)] == [1600, 1600, 800, 25]


def test_a_command_has_a_size() -> None:
    half = "ü" * (COMMAND_BYTES // 4)
    assert checked_command(Command(cmd="x", args=(half,)))
    for command in (
        Command(cmd="x", args=(half, half)),
        Command(cmd="x", args=("",) * (COMMAND_BYTES // 8)),
        Command(cmd="x", envs={half: half}),
        Command(cmd="\ud800" * COMMAND_BYTES),
    ):
        with pytest.raises(InvalidRequest, match="together"):
            checked_command(command)


@pytest.mark.parametrize("database_url", [None])
async def test_a_command_that_is_too_long_is_refused(user: Team, host: HostDouble) -> None:
    id = await _create(user)
    for body in ({"args": [""] * 150_000}, {"args": [""] * 150_000, "background": True}):
        answer = await user.client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "x", **body})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert host.commands == []


async def test_the_history_holds_the_last_events(
    faulty: Server, user: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_store, "EVENTS_KEPT", 5)
    id, other = await _create(user), await _create(user)
    for _ in range(3):
        for verb in ("pause", "resume"):
            assert (await user.client.post(f"/v1/sandboxes/{id}/{verb}")).status_code == 200
    events = (await user.client.get(f"/v1/sandboxes/{id}/events")).json()
    assert [each["event"] for each in events] == [
        "resumed",
        "resume",
        "paused",
        "pause",
        "resumed",
        "resume",
    ]
    assert len((await user.client.get(f"/v1/sandboxes/{other}/events")).json()) == 3


async def test_the_history_holds_the_last_changes_of_the_network_policy(
    user: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_store, "EVENTS_KEPT", 4)
    id = await _create(user)
    for number in range(6):
        policy = {"deny": [f"192.0.2.{number}"]}
        assert (await user.client.put(f"/v1/sandboxes/{id}/network", json=policy)).status_code < 300
    events = (await user.client.get(f"/v1/sandboxes/{id}/events")).json()
    assert [each["event"] for each in events] == ["network"] * 4


async def test_of_ended_sandboxes_the_last_are_listed(
    settings: Settings, host: HostDouble, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandboxes, "ENDED_KEPT", 2)
    async with serve(settings, host, clock) as server:
        team, stranger = await server.team(), await server.team()
        running = await _create(team)
        ended = []
        for each in (team, stranger, team, team):
            id = await _create(each)
            clock.now += timedelta(seconds=1)
            assert (await each.client.delete(f"/v1/sandboxes/{id}")).status_code == 204
            ended.append(id)
        await server.plane.reconciler.sweep()
        listed = {each["id"] for each in (await team.client.get("/v1/sandboxes")).json()}
        assert listed == {running, ended[2], ended[3]}
        assert (await stranger.client.get(f"/v1/sandboxes/{ended[1]}")).status_code == 200


@pytest.mark.parametrize("database_url", [None])
async def test_uploads_that_wait_on_the_server(
    faulty: Server, user: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = await _create(user)
    for number in range(5):
        monkeypatch.setattr(faulty.plane.guests._spools, "_per_sandbox", 0 if number % 2 else 4)
        content = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b\r\n'
        content += b'Content-Disposition: form-data; name="path"\r\n\r\n/f\r\n--b--\r\n'
        answer = await user.client.post(
            f"/v1/sandboxes/{id}/files/write",
            content=content,
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        )
        assert answer.status_code == (429 if number % 2 else 204), answer.text


_HARD_TO_PARSE = b'{"email": [' + b"{}," * 300_000 + b"1]}"


@pytest.mark.parametrize("database_url", [None])
async def test_large_bodies_of_one_address_hold_nobody_up(server: Server) -> None:
    """They are parsed one after the other, and others are served between them."""
    client = server.client()

    async def log_in() -> None:
        answer = await client.post("/v1/auth/login", content=_HARD_TO_PARSE)
        assert answer.status_code == 400

    async def longest_wait(calls: int) -> float:
        calling = asyncio.gather(*(log_in() for _ in range(calls)))
        waits = []
        while not calling.done():
            begin = time.thread_time()
            await asyncio.sleep(0)
            waits.append(time.thread_time() - begin)
        await calling
        return max(waits)

    await log_in()
    alone = min([await longest_wait(1) for _ in range(3)])
    together = min([await longest_wait(8) for _ in range(3)])
    assert together < 4 * alone
