"""Commands that are followed over a WebSocket, on real processes."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from support.api_server import Server, Team, eventually
from support.host_double import HostDouble
from support.listening import listening
from support.sockets import Frame, Peer, output_of, talking
from wrenn_sandbox.control.api.streams import frames, session, websocket
from wrenn_sandbox.errors import AgentError, InvalidRequest
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.messages import Channel, Ended, Output

pytestmark = pytest.mark.slow


@pytest.fixture(params=["sqlite"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """None of this depends on the database."""
    return None


@pytest.fixture
async def sandbox(team: Team) -> str:
    return str((await team.client.post("/v1/sandboxes")).json()["id"])


@pytest.fixture
async def doubled(user: Team) -> str:
    return str((await user.client.post("/v1/sandboxes")).json()["id"])


@pytest.fixture
async def port(server: Server) -> AsyncIterator[int]:
    async with listening(server.app) as port:
        yield port


@pytest.fixture
async def url(port: int, sandbox: str) -> str:
    return _url(port, sandbox)


def _url(port: int, sandbox: str) -> str:
    return f"ws://127.0.0.1:{port}/v1/sandboxes/{sandbox}/exec/stream"


@pytest.fixture
async def peer(url: str, team: Team) -> AsyncIterator[Peer]:
    async with talking(url, team.key) as peer:
        yield peer


async def _run(peer: Peer, script: str, **fields: object) -> list[Frame]:
    await peer.say(type="start", cmd="sh", args=["-c", script], **fields)
    return await peer.rest()


async def _exec(team: Team, sandbox: str, script: str) -> int:
    answer = await team.client.post(
        f"/v1/sandboxes/{sandbox}/exec", json={"cmd": "sh", "args": ["-c", script]}
    )
    return int(answer.json()["exit_code"])


async def test_a_command_from_start_to_exit(peer: Peer) -> None:
    frames = await _run(peer, "echo out; echo err >&2; exit 3")
    assert frames[0]["type"] == "start"
    assert isinstance(frames[0]["pid"], int)
    assert output_of(frames) == "out\n"
    assert output_of(frames, "stderr") == "err\n"
    assert frames[-1] == {"type": "exit", "exit_code": 3}
    assert peer.closed_with == (1000, "")
    assert {frame["type"] for frame in frames} == {"start", "stdout", "stderr", "exit"}


async def test_what_a_followed_command_leaves_running_goes_on(peer: Peer, tmp_path: Path) -> None:
    done = tmp_path / "done"
    frames = await _run(peer, f"(sleep 1; echo late; echo late >&2; touch {done}) & echo started")
    assert output_of(frames) == "started\n"
    assert frames[-1] == {"type": "exit", "exit_code": 0}
    assert not done.exists()
    await eventually(done.exists)


async def test_a_followed_command_gets_input_and_its_end(peer: Peer) -> None:
    await peer.say(type="start", cmd="cat")
    await peer.say(type="stdin", data="hé")
    await peer.until("stdout", "hé")
    await peer.say(type="stdin", data=base64.b64encode(b"\xff").decode(), encoding="base64")
    await peer.say(type="stdin_close")
    frames = await peer.rest()
    assert [frame for frame in frames if frame["type"] == "stdout"] == [
        {"type": "stdout", "data": "/w==", "encoding": "base64"}
    ]
    assert frames[-1] == {"type": "exit", "exit_code": 0}


async def test_output_comes_while_the_command_runs(peer: Peer) -> None:
    await peer.say(type="start", cmd="sh", args=["-c", "echo first; read line; echo $line"])
    await peer.until("stdout", "first\n")
    await peer.say(type="stdin", data="second\n")
    frames = await peer.rest()
    assert output_of(frames) == "second\n"


async def test_a_character_that_is_split_arrives_whole(peer: Peer) -> None:
    script = r"printf '\360\237'; sleep 0.2; printf '\246\234|\303'; sleep 0.2; printf '\274'"
    frames = await _run(peer, script)
    assert output_of(frames) == "🦜|ü"
    assert all("encoding" not in frame for frame in frames)


async def test_what_is_no_text_arrives_as_it_is(peer: Peer) -> None:
    frames = await _run(peer, r"printf 'a\377\000'; sleep 0.2; printf 'text\303'")
    data = output_of(frames).encode("utf-8", "surrogateescape")
    assert data == b"a\xff\0text\xc3"
    kinds = [frame.get("encoding") for frame in frames if frame["type"] == "stdout"]
    assert kinds == ["base64", None, "base64"]


async def test_much_output_of_a_followed_command_arrives_in_order(peer: Peer) -> None:
    count = 2_000_000
    frames = await _run(peer, f"seq {count}; echo end >&2")
    assert output_of(frames) == "".join(f"{n}\n" for n in range(1, count + 1))
    assert output_of(frames, "stderr") == "end\n"


async def test_a_followed_command_takes_environment_directory_and_user(peer: Peer) -> None:
    frames = await _run(peer, "echo $COLOUR; pwd; id -un", envs={"COLOUR": "grün"}, cwd="/tmp")
    assert output_of(frames) == "grün\n/tmp\nroot\n"


@pytest.mark.parametrize(("cmd", "code"), [("no-such-program", 127), ("/etc/passwd", 126)])
async def test_a_followed_command_that_cannot_be_started_says_why(
    peer: Peer, cmd: str, code: int
) -> None:
    await peer.say(type="start", cmd=cmd)
    frames = await peer.rest()
    assert [frame["type"] for frame in frames] == ["stderr", "exit"]
    assert frames[-1]["exit_code"] == code
    assert peer.closed_with[0] == 1000


@pytest.mark.parametrize("fields", [{"cwd": "/no/such"}, {"user": "nobody-here"}])
async def test_a_directory_or_user_that_does_not_exist(peer: Peer, fields: dict[str, str]) -> None:
    await peer.say(type="start", cmd="true", **fields)
    (frame,) = await peer.rest()
    assert (frame["type"], frame["code"]) == ("error", "invalid_request")
    assert peer.closed_with[0] == 1000


async def test_a_followed_command_can_have_a_terminal(peer: Peer) -> None:
    await peer.say(type="start", cmd="sh", tty=True, cols=100, rows=30)
    await peer.say(type="stdin", data="stty -echo size\n")
    await peer.until("stdout", "30 100")
    await peer.say(type="resize", cols=120, rows=40)
    await peer.say(type="stdin", data="stty size\n")
    await peer.until("stdout", "40 120")
    await peer.say(type="stdin_close")
    assert (await peer.rest())[-1] == {"type": "exit", "exit_code": 0}


async def test_stop_ends_the_process_group(peer: Peer, team: Team, sandbox: str) -> None:
    await peer.say(type="start", cmd="sh", args=["-c", "echo up; sleep 7654 & sleep 7654"])
    await peer.until("stdout", "up")
    await peer.say(type="stop")
    assert (await peer.rest())[-1] == {"type": "exit", "exit_code": 143}
    assert await _exec(team, sandbox, "pgrep -f '^sleep 7654'") == 1


async def test_stop_kills_what_does_not_end(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "TERM_SECONDS", 0.2)
    await peer.say(
        type="start",
        cmd="sh",
        args=["-c", "trap 'echo no' TERM; echo up; while :; do sleep 9; done"],
    )
    await peer.until("stdout", "up")
    await peer.say(type="stop")
    frames = await peer.rest()
    assert frames[-1] == {"type": "exit", "exit_code": 137}


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_a_lost_connection_ends_the_process(
    server: Server, url: str, team: Team, sandbox: str, how: str
) -> None:
    async with talking(url, team.key) as peer:
        await peer.say(type="start", cmd="sh", args=["-c", "echo up; sleep 7655"])
        await peer.until("stdout", "up")
        assert server.plane.activity.users_of(SandboxId(sandbox))
        if how == "abort":
            peer.connection.transport.abort()
    await eventually(lambda: not server.plane.activity.users_of(SandboxId(sandbox)))
    assert await _exec(team, sandbox, "pgrep -f '^sleep 7655'") == 1


async def test_a_lost_connection_with_input_that_nobody_reads(
    server: Server, team: Team, sandbox: str
) -> None:
    """The command reads nothing, so the server reads no more: the loss shows all the same."""
    async with listening(server.app, ping_interval=0.2) as port:
        async with talking(_url(port, sandbox), team.key) as peer:
            await peer.say(type="start", cmd="sh", args=["-c", "echo up; exec sleep 7656"])
            await peer.until("stdout", "up")
            sending = asyncio.create_task(_flood(peer))
            await asyncio.wait([sending], timeout=1)
            assert not sending.done()
            peer.connection.transport.abort()
            await asyncio.wait([sending])
        await eventually(lambda: not server.plane.activity.users_of(SandboxId(sandbox)))
    assert await _exec(team, sandbox, "pgrep -f '^sleep 7656'") == 1


async def test_a_connection_that_is_lost_while_the_command_starts(
    server: Server, url: str, team: Team, sandbox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = websocket.Socket.send
    async with talking(url, team.key) as peer:

        async def send_late(socket: websocket.Socket, frame: frames.Frame) -> None:
            peer.connection.transport.abort()
            await socket.lost.wait()
            await send(socket, frame)

        monkeypatch.setattr(websocket.Socket, "send", send_late)
        await peer.say(type="start", cmd="sleep", args=["7657"])
        await peer.rest()
    await eventually(lambda: not server.plane.activity.users_of(SandboxId(sandbox)))
    assert await _exec(team, sandbox, "pgrep -f '^sleep 7657'") == 1


async def _flood(peer: Peer) -> None:
    with suppress(ConnectionClosed):
        while True:
            await peer.say(type="stdin", data="x" * 100_000)


async def test_stop_gets_through_input_that_is_read_slowly(peer: Peer) -> None:
    await peer.say(type="start", cmd="sh", args=["-c", "echo up; exec sleep 60"])
    await peer.until("stdout", "up")
    for _ in range(5):
        await peer.say(type="stdin", data="x" * 100_000)
    await peer.say(type="stop")
    assert (await peer.rest())[-1] == {"type": "exit", "exit_code": 143}


async def test_input_to_a_command_that_closed_its_own(peer: Peer) -> None:
    await peer.say(type="start", cmd="sh", args=["-c", "exec <&-; echo up; sleep 0.3; echo done"])
    await peer.until("stdout", "up")
    for _ in range(30):
        await peer.say(type="stdin", data="x" * 100_000)
    frames = await peer.rest()
    assert output_of(frames) == "done\n"
    assert frames[-1] == {"type": "exit", "exit_code": 0}


async def test_a_command_that_closes_its_output_and_lives_on(peer: Peer) -> None:
    begin = time.monotonic()
    frames = await _run(peer, "echo out; exec >&- 2>&-; sleep 0.5; exit 7")
    assert frames[-1] == {"type": "exit", "exit_code": 7}
    assert time.monotonic() - begin >= 0.5


def _resident_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError


async def test_a_reader_that_stops_reading_stops_the_command(
    server: Server, url: str, team: Team, sandbox: str
) -> None:
    async with talking(url, team.key) as peer:
        before = _resident_kib()
        script = "head -c 1G /dev/zero | tr '\\0' x | tee >(wc -c >&2) ; echo"
        await peer.say(type="start", cmd="bash", args=["-c", script])
        await peer.until("stdout", "x")
        await asyncio.sleep(1)
        assert _resident_kib() - before < 32 * 1024
        assert await _exec(team, sandbox, "pgrep -x tee") == 0
        peer.connection.transport.abort()
    await eventually(lambda: not server.plane.activity.users_of(SandboxId(sandbox)))


@pytest.mark.parametrize(
    "message",
    [
        "",
        "nonsense",
        "[]",
        "null",
        '{"type": "nonsense"}',
        '{"cmd": "true"}',
        '{"type": "start"}',
        '{"type": "start", "cmd": ""}',
        '{"type": "start", "cmd": 1}',
        '{"type": "start", "cmd": "a\\u0000b"}',
        '{"type": "start", "cmd": "a", "args": "b"}',
        '{"type": "start", "cmd": "a", "envs": {"": "b"}}',
        '{"type": "start", "cmd": "a", "tty": true, "cols": 0}',
        '{"type": "start", "cmd": "\\ud800"}',
        '{"type": "stdin", "data": "early"}',
        '{"type": "stop"}',
        "{" * 100_000,
    ],
)
async def test_a_stream_refuses_wrong_first_messages(peer: Peer, message: str) -> None:
    await peer.connection.send(message)
    (frame,) = await peer.rest()
    assert (frame["type"], frame["code"]) == ("error", "invalid_request")
    assert peer.closed_with[0] == 4400


@pytest.mark.parametrize(
    "message",
    [
        "nonsense",
        '{"type": "nonsense"}',
        '{"type": "start", "cmd": "true"}',
        '{"type": "stdin"}',
        '{"type": "stdin", "data": "?", "encoding": "base64"}',
        '{"type": "resize", "cols": -1, "rows": 1}',
    ],
)
async def test_later_messages_that_are_not_acceptable(
    server: Server, peer: Peer, team: Team, sandbox: str, message: str
) -> None:
    await peer.say(type="start", cmd="sh", args=["-c", "echo up; sleep 7657"])
    await peer.until("stdout", "up")
    await peer.connection.send(message)
    (frame,) = await peer.rest()
    assert (frame["type"], frame["code"]) == ("error", "invalid_request")
    assert peer.closed_with[0] == 4400
    await eventually(lambda: not server.plane.activity.users_of(SandboxId(sandbox)))
    assert await _exec(team, sandbox, "pgrep -f '^sleep 7657'") == 1


async def test_messages_may_be_binary(peer: Peer) -> None:
    await peer.connection.send(json.dumps({"type": "start", "cmd": "true"}).encode())
    assert (await peer.rest())[-1] == {"type": "exit", "exit_code": 0}


async def test_a_message_that_is_too_large(
    server: Server, peer: Peer, team: Team, sandbox: str
) -> None:
    await peer.say(type="start", cmd="sh", args=["-c", "echo up; sleep 7658"])
    await peer.until("stdout", "up")
    await peer.say(type="stdin", data="x" * (1 << 20))
    await peer.rest()
    assert peer.closed_with[0] == 1009
    await eventually(lambda: not server.plane.activity.users_of(SandboxId(sandbox)))
    assert await _exec(team, sandbox, "pgrep -f '^sleep 7658'") == 1


async def test_a_start_that_does_not_come(
    url: str, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert websocket.START_SECONDS == 10
    monkeypatch.setattr(websocket, "START_SECONDS", 1.0)
    async with talking(url, team.key) as peer:
        (frame,) = await peer.rest()
        assert (frame["type"], frame["code"]) == ("error", "invalid_request")
        assert "within 1 s" in str(frame["data"])
        assert peer.closed_with[0] == 4400


async def test_refusals_before_the_upgrade(
    server: Server, team: Team, sandbox: str, port: int
) -> None:
    stranger = await server.team()
    paused = str((await team.client.post("/v1/sandboxes")).json()["id"])
    await team.client.post(f"/v1/sandboxes/{paused}/pause")
    for id, key, status, code in (
        (sandbox, "wrn_" + "0" * 32, 401, "unauthorized"),
        (sandbox, "", 401, "unauthorized"),
        (sandbox, stranger.key, 404, "not_found"),
        ("sb-unknown", team.key, 404, "not_found"),
        (paused, team.key, 409, "invalid_state"),
    ):
        with pytest.raises(InvalidStatus) as caught:
            async with talking(_url(port, id), key):
                pass
        answer = caught.value.response
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"].startswith("req-")
        assert json.loads(answer.body or b"")["error"]["code"] == code


async def test_a_socket_that_is_not_there(port: int, team: Team) -> None:
    with pytest.raises(InvalidStatus) as caught:
        async with talking(f"ws://127.0.0.1:{port}/v1/nowhere", team.key):
            pass
    assert caught.value.response.status_code == 404
    assert json.loads(caught.value.response.body or b"")["error"]["code"] == "not_found"


async def test_an_ordinary_request_is_told(team: Team, sandbox: str) -> None:
    answer = await team.client.get(f"/v1/sandboxes/{sandbox}/exec/stream")
    assert answer.status_code == 400
    assert "WebSocket" in answer.json()["error"]["message"]


async def test_a_token_in_the_headers(url: str, team: Team) -> None:
    async with talking(url, None, Authorization=f"bearer {team.token}") as peer:
        await peer.say(type="start", cmd="true")
        assert (await peer.rest())[-1] == {"type": "exit", "exit_code": 0}


async def test_a_credential_as_the_first_message(url: str, team: Team) -> None:
    for secret in (team.token, team.key):
        async with talking(url, None) as peer:
            await peer.say(type="auth", token=secret)
            await peer.say(type="start", cmd="true")
            assert (await peer.rest())[-1] == {"type": "exit", "exit_code": 0}


async def test_refusals_after_the_upgrade(
    server: Server, team: Team, sandbox: str, port: int
) -> None:
    stranger = await server.team()
    paused = str((await team.client.post("/v1/sandboxes")).json()["id"])
    await team.client.post(f"/v1/sandboxes/{paused}/pause")
    for id, message, close, code in (
        (sandbox, {"type": "auth", "token": "nonsense"}, 4401, "unauthorized"),
        (sandbox, {"type": "auth", "token": "wrn_" + "0" * 32}, 4401, "unauthorized"),
        (sandbox, {"type": "start", "cmd": "true"}, 4400, "invalid_request"),
        (sandbox, {"type": "auth", "token": stranger.token}, 4404, "not_found"),
        (paused, {"type": "auth", "token": team.token}, 4409, "invalid_state"),
    ):
        async with talking(_url(port, id), None) as peer:
            await peer.connection.send(json.dumps(message))
            (frame,) = await peer.rest()
            assert (frame["type"], frame["code"]) == ("error", code)
            assert peer.closed_with[0] == close


async def test_a_credential_that_does_not_come(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "AUTH_SECONDS", 0.1)
    async with talking(url, None) as peer:
        (frame,) = await peer.rest()
        assert (frame["type"], frame["code"]) == ("error", "invalid_request")
        assert peer.closed_with[0] == 4400


@pytest.mark.parametrize("ending", ["pause", "rollback", "delete"])
async def test_the_websocket_of_a_command_ends_with_its_sandbox(
    server: Server, peer: Peer, team: Team, sandbox: str, ending: str
) -> None:
    if ending == "rollback":
        body = {"name": "before"}
        made = await team.client.post(f"/v1/sandboxes/{sandbox}/snapshots", json=body)
        assert made.status_code == 201
    await peer.say(type="start", cmd="sh", args=["-c", "echo up; sleep 60"])
    await peer.until("stdout", "up")
    if ending == "rollback":
        path = f"/v1/sandboxes/{sandbox}/rollback"
        work = server.start(team.client.post(path, json={"snapshot": "before"}))
    elif ending == "pause":
        work = server.start(team.client.post(f"/v1/sandboxes/{sandbox}/pause"))
    else:
        work = server.start(team.client.delete(f"/v1/sandboxes/{sandbox}"))
    async with asyncio.timeout(patience(20)):
        (frame,) = await peer.rest()
    assert (frame["type"], frame["code"]) == ("error", "invalid_state")
    code, reason = peer.closed_with
    assert code == 1000
    assert reason
    assert reason in str(frame["data"])
    assert (await work).status_code in (200, 204)
    if ending == "rollback":
        assert "roll" in reason


async def test_a_stream_tells_of_a_guest_that_fails(
    faulty: Server, user: Team, doubled: str, host: HostDouble
) -> None:
    async with listening(faulty.app) as port:
        for error, code in (
            (AgentError("The sandbox sent a malformed answer"), "agent_error"),
            (InvalidRequest("no"), "invalid_request"),
            (ValueError("a mistake"), "internal_error"),
        ):
            host.fail["start_process"] = error
            async with talking(_url(port, doubled), user.key) as peer:
                await peer.say(type="start", cmd="true")
                (frame,) = await peer.rest()
                assert (frame["type"], frame["code"]) == ("error", code)
                assert "mistake" not in str(frame)
                assert peer.closed_with[0] == 1000


async def test_frames_of_a_scripted_command(
    faulty: Server, user: Team, doubled: str, host: HostDouble
) -> None:
    host.output = [Output(Channel.STDOUT, b"a"), Output(Channel.STDERR, b"\xe2\x82"), Ended(4)]
    async with listening(faulty.app) as port, talking(_url(port, doubled), user.key) as peer:
        await peer.say(type="start", cmd="true")
        assert await peer.rest() == [
            {"type": "start", "pid": 1000},
            {"type": "stdout", "data": "a"},
            {"type": "stderr", "data": "4oI=", "encoding": "base64"},
            {"type": "exit", "exit_code": 4},
        ]


async def test_many_streams_at_once(server: Server, url: str, team: Team, sandbox: str) -> None:
    count = 200
    barrier = asyncio.Barrier(count)

    async def one(number: int) -> str:
        async with talking(url, team.key) as peer:
            await peer.say(type="start", cmd="cat")
            assert (await peer.hear())["type"] == "start"
            await barrier.wait()
            await peer.say(type="stdin", data=f"hello {number}")
            await peer.say(type="stdin_close")
            return output_of(await peer.rest())

    async with asyncio.timeout(120):
        told = await asyncio.gather(*[one(number) for number in range(count)])
    assert told == [f"hello {number}" for number in range(count)]
    await eventually(lambda: not server.plane.activity.users_of(SandboxId(sandbox)))
