"""Terminals over a WebSocket."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator

import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from support.api_server import Server, Team, eventually
from support.listening import listening
from support.sockets import Peer, output_of, talking
from wrenn_sandbox.control.api.streams import pty, session
from wrenn_sandbox.host.guest import RunningGuest
from wrenn_sandbox.ids import SandboxId

pytestmark = pytest.mark.slow


@pytest.fixture(params=["sqlite"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """None of this depends on the database."""
    return None


@pytest.fixture
async def sandbox(team: Team) -> str:
    return str((await team.client.post("/v1/sandboxes")).json()["id"])


@pytest.fixture
async def url(server: Server, sandbox: str) -> AsyncIterator[str]:
    async with listening(server.app) as port:
        yield f"ws://127.0.0.1:{port}/v1/sandboxes/{sandbox}/pty"


@pytest.fixture
async def peer(url: str, team: Team) -> AsyncIterator[Peer]:
    async with talking(url, team.key) as peer:
        yield peer


async def _type(peer: Peer, text: str) -> None:
    await peer.say(type="input", data=base64.b64encode(text.encode()).decode())


async def test_a_login_shell(peer: Peer) -> None:
    await peer.say(type="start", cols=101, rows=31)
    started = await peer.hear()
    assert started["type"] == "started"
    assert str(started["tag"]).startswith("proc-")
    assert isinstance(started["pid"], int)
    await _type(peer, "stty -echo; stty size; shopt -q login_shell && echo login; echo $TERM\n")
    await peer.until("output", "31 101\r\nlogin\r\nxterm")
    await peer.say(type="resize", cols=120, rows=40)
    await _type(peer, "stty size; printf 'ü\\377'; exit 6\n")
    frames = await peer.rest()
    assert "40 120\r\nü\udcff" in output_of(frames, "output")
    assert frames[-1] == {"type": "exit", "exit_code": 6}
    assert peer.closed_with[0] == 1000


async def _bytes_until_exit(peer: Peer) -> bytes:
    """What a client of binary frames is shown; all else is JSON in text frames."""
    shown = b""
    while True:
        message = await peer.connection.recv()
        if isinstance(message, bytes):
            shown += message
        elif (frame := json.loads(message))["type"] != "started":
            assert frame == {"type": "exit", "exit_code": 6}
            return shown


async def test_binary_frames_by_subprotocol(url: str, team: Team) -> None:
    offered = [Subprotocol("other"), Subprotocol("binary")]
    headers = {"X-API-Key": team.key}
    async with connect(url, additional_headers=headers, subprotocols=offered) as connection:
        assert connection.subprotocol == "binary"
        peer = Peer(connection)
        await peer.say(type="start", cmd="sh", args=["-c", "printf 'a\\377'; read x; exit $x"])
        assert (await peer.hear())["type"] == "started"
        assert await connection.recv() == b"a\xff"
        await connection.send(b"6\n")
        assert await _bytes_until_exit(peer) == b"6\r\n"


async def test_binary_frames_by_the_first_binary_frame(
    url: str, team: Team, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written while that frame is on its way is not sent as JSON."""
    monkeypatch.setattr(pty, "SILENCE_SECONDS", 5.0)
    await peer.say(type="start", cmd="sh", args=["-c", "stty -echo; echo early; read x; exit $x"])
    await peer.say(type="resize", cols=90, rows=30)
    assert (await peer.hear())["type"] == "started"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await peer.hear()
    # like JSON, and a terminal's input all the same
    await peer.connection.send(b"6")
    await peer.connection.send(b"\n")
    assert await _bytes_until_exit(peer) == b"early\r\n"


async def test_a_silent_client_is_told_in_json(peer: Peer) -> None:
    await peer.say(type="start", cmd="sh", args=["-c", "echo early; read x; exit $x"])
    await peer.until("output", "early\r\n")
    await peer.connection.send(b"6\n")
    assert await _bytes_until_exit(peer) == b"6\r\n"


@pytest.mark.parametrize("path", ["pty", "exec/stream", "processes/mine/stream"])
async def test_answers_to_pings(url: str, team: Team, sandbox: str, path: str) -> None:
    start = {"cmd": "sleep", "args": ["0.3"]}
    if path.startswith("processes"):
        route = f"/v1/sandboxes/{sandbox}/exec"
        await team.client.post(route, json={**start, "background": True, "tag": "mine"})
    async with talking(url.replace("pty", path), team.key) as peer:
        await peer.say(type="start", **start)
        await peer.say(type="pong")
        assert (await peer.rest())[-1] == {"type": "exit", "exit_code": 0}


async def test_control_characters_reach_the_terminal(peer: Peer) -> None:
    await peer.say(type="start", cmd="sh", args=["-c", "echo up; while :; do :; done"])
    await peer.until("output", "up")
    await _type(peer, "\x03")
    assert (await peer.rest())[-1] == {"type": "exit", "exit_code": 130}


async def test_coming_back_by_the_tag(
    server: Server, url: str, team: Team, sandbox: str, peer: Peer
) -> None:
    await peer.say(type="start", cmd="sh", tag="mine", envs={"PS1": "ready> "})
    assert (await peer.hear())["tag"] == "mine"
    await _type(peer, "V=kept; stty -echo; echo said\n")
    await peer.until("output", "said\r\n")
    await peer.connection.close()
    await eventually(lambda: not server.plane.activity.users_of(SandboxId(sandbox)))
    async with talking(url, team.key) as again:
        await again.say(type="connect", tag="mine")
        assert (await again.hear())["type"] == "started"
        await again.until("output", "said\r\n")
        await _type(again, "echo $V\n")
        await again.until("output", "kept\r\n")
        await again.say(type="kill")
        assert (await again.rest())[-1] == {"type": "exit", "exit_code": 137}


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once a session has noticed that its client is gone; the guest takes no input before."""
    gone = asyncio.Event()
    send_input, client_gone = RunningGuest.send_input, session.Session._client_gone

    async def held(self: RunningGuest, pid: int, data: bytes, *, terminal: bool) -> None:
        await gone.wait()
        await send_input(self, pid, data, terminal=terminal)

    def noticed(self: session.Session) -> None:
        client_gone(self)
        asyncio.get_running_loop().call_soon(gone.set)

    monkeypatch.setattr(RunningGuest, "send_input", held)
    monkeypatch.setattr(session.Session, "_client_gone", noticed)
    return gone


async def test_input_before_a_hasty_good_bye(
    server: Server, url: str, team: Team, sandbox: str, peer: Peer, gone: asyncio.Event
) -> None:
    await peer.say(type="start", cmd="sh", tag="mine")
    assert (await peer.hear())["tag"] == "mine"
    await _type(peer, "stty -echo; FIRST=on")
    await _type(peer, "ly\nSECOND=" + "x" * 1000 + "\n")
    assert not gone.is_set()
    await peer.connection.close()
    await eventually(lambda: not server.plane.activity.users_of(SandboxId(sandbox)))
    async with talking(url, team.key) as again:
        await again.say(type="connect", tag="mine")
        await _type(again, "echo $FIRST ${#SECOND}; exit 8\n")
        frames = await again.rest()
    assert "only 1000\r\n" in output_of(frames, "output")
    assert frames[-1] == {"type": "exit", "exit_code": 8}


async def test_a_tag_that_is_taken_or_unknown(url: str, team: Team, peer: Peer) -> None:
    await peer.say(type="start", cmd="sh", tag="mine")
    await peer.hear()
    for message, code in (
        ({"type": "start", "cmd": "sh", "tag": "mine"}, "conflict"),
        ({"type": "connect", "tag": "other"}, "not_found"),
        ({"type": "start", "cmd": "no-such-program"}, "invalid_request"),
        ({"type": "start", "cwd": "/no/such"}, "invalid_request"),
    ):
        async with talking(url, team.key) as second:
            await second.say(**message)
            (frame,) = await second.rest()
            assert (frame["type"], frame["code"], frame["fatal"]) == ("error", code, True)
            assert second.closed_with[0] == 1000


@pytest.mark.parametrize(
    "message",
    [
        {"type": "input", "data": ""},
        {"type": "start", "cols": 0, "rows": 1},
        {"type": "start", "tag": "1"},
        {"type": "connect"},
        {},
    ],
)
async def test_a_terminal_refuses_wrong_first_messages(
    peer: Peer, message: dict[str, object]
) -> None:
    await peer.say(**message)
    (frame,) = await peer.rest()
    assert (frame["type"], frame["code"]) == ("error", "invalid_request")
    assert peer.closed_with[0] == 4400


async def test_input_that_is_not_acceptable(team: Team, sandbox: str, url: str, peer: Peer) -> None:
    await peer.say(type="start", cmd="sh", tag="mine")
    await peer.say(type="input", data="not base64!")
    frames = await peer.rest()
    assert frames[-1]["code"] == "invalid_request"
    assert peer.closed_with[0] == 4400
    async with talking(url, team.key) as again:
        await again.say(type="connect", tag="mine")
        assert (await again.hear())["type"] == "started"


async def test_a_terminal_sends_pings_while_it_is_idle(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "PING_SECONDS", 0.1)
    await peer.say(type="start", cmd="sleep", args=["60"])
    assert (await peer.hear())["type"] == "started"
    assert await peer.hear() == {"type": "ping"}


async def test_a_terminal_ends_with_its_sandbox(
    server: Server, team: Team, sandbox: str, peer: Peer
) -> None:
    await peer.say(type="start", cmd="sleep", args=["60"])
    assert (await peer.hear())["type"] == "started"
    deleting = server.start(team.client.delete(f"/v1/sandboxes/{sandbox}"))
    async with asyncio.timeout(5):
        (frame,) = await peer.rest()
    assert (frame["type"], frame["code"]) == ("error", "invalid_state")
    assert (await deleting).status_code == 204
