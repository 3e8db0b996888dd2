"""Commands in the background: started, listed, followed, ended."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx2
import pytest
from websockets.exceptions import InvalidStatus

from support.api_server import Server, Team, eventually
from support.host_double import HostDouble
from support.listening import listening
from support.sockets import output_of, talking
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.wire.messages import ProcessSignal

pytestmark = pytest.mark.slow


@pytest.fixture(params=["sqlite"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """None of this depends on the database."""
    return None


@pytest.fixture
async def sandbox(team: Team) -> str:
    return str((await team.client.post("/v1/sandboxes")).json()["id"])


@pytest.fixture
async def port(server: Server) -> AsyncIterator[int]:
    async with listening(server.app) as port:
        yield port


def _url(port: int, sandbox: str, process: object) -> str:
    return f"ws://127.0.0.1:{port}/v1/sandboxes/{sandbox}/processes/{process}/stream"


async def _start(team: Team, sandbox: str, script: str, **fields: object) -> httpx2.Response:
    body = {"cmd": "sh", "args": ["-c", script], "background": True, **fields}
    return await team.client.post(f"/v1/sandboxes/{sandbox}/exec", json=body)


async def _list(team: Team, sandbox: str) -> list[dict[str, object]]:
    answer = await team.client.get(f"/v1/sandboxes/{sandbox}/processes")
    assert answer.status_code == 200
    return list(answer.json()["processes"])


async def _signal(team: Team, sandbox: str, process: object, query: str = "") -> httpx2.Response:
    return await team.client.delete(f"/v1/sandboxes/{sandbox}/processes/{process}{query}")


def _told(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def _until_gone(team: Team, sandbox: str, pid: int) -> None:
    async with asyncio.timeout(5):
        while any(each["pid"] == pid for each in await _list(team, sandbox)):
            pass


async def test_a_command_in_the_background(team: Team, sandbox: str) -> None:
    answer = await _start(team, sandbox, "sleep 60")
    assert answer.status_code == 202
    started = answer.json()
    assert started["sandbox_id"] == sandbox
    assert started["cmd"] == "sh"
    assert started["tag"].startswith("proc-")
    assert len(started["tag"]) == len("proc-") + 8
    assert await _list(team, sandbox) == [
        {"pid": started["pid"], "tag": started["tag"], "cmd": "sh", "args": ["-c", "sleep 60"]}
    ]
    assert (await _signal(team, sandbox, started["pid"])).status_code == 204
    await _until_gone(team, sandbox, started["pid"])
    assert _told(await _signal(team, sandbox, started["pid"])) == (404, "not_found")


async def test_a_tag_of_the_callers(team: Team, sandbox: str) -> None:
    pid = (await _start(team, sandbox, "sleep 60", tag="my.tag_1")).json()["pid"]
    assert _told(await _start(team, sandbox, "true", tag="my.tag_1")) == (409, "conflict")
    assert (await _signal(team, sandbox, "my.tag_1", "?signal=SIGTERM")).status_code == 204
    await _until_gone(team, sandbox, pid)
    assert (await _start(team, sandbox, "true", tag="my.tag_1")).status_code == 202


@pytest.mark.parametrize("tag", ["", "123", "a b", "a/b", "x" * 65, "ü", 1])
async def test_tags_that_are_not_acceptable(team: Team, sandbox: str, tag: object) -> None:
    assert _told(await _start(team, sandbox, "true", tag=tag)) == (400, "invalid_request")


async def test_a_background_command_that_cannot_be_started_says_why(
    team: Team, sandbox: str
) -> None:
    for fields in ({"cmd": "no-such-program"}, {"cwd": "/no/such"}, {"user": "nobody-here"}):
        answer = await _start(team, sandbox, "true", **fields)
        assert _told(answer) == (400, "invalid_request")
        assert answer.json()["error"]["message"]


async def test_processes_that_cannot_be_signalled_are_told_apart(team: Team, sandbox: str) -> None:
    for process in ("1", "0", "999999999", "9" * 30, "nothing", "-1"):
        assert _told(await _signal(team, sandbox, process)) == (404, "not_found")
    pid = (await _start(team, sandbox, "sleep 60")).json()["pid"]
    for query in ("?signal=SIGSTOP", "?signal=9", "?signal="):
        assert _told(await _signal(team, sandbox, pid, query)) == (400, "invalid_request")


async def test_processes_of_other_teams_and_states_are_refused(
    server: Server, team: Team, sandbox: str
) -> None:
    stranger = await server.team()
    for path in ("processes", "metrics"):
        url = f"/v1/sandboxes/{sandbox}/{path}"
        assert _told(await stranger.client.get(url)) == (404, "not_found")
        assert _told(await server.client().get(url)) == (401, "unauthorized")
    assert _told(await _signal(stranger, sandbox, "x")) == (404, "not_found")
    await team.client.post(f"/v1/sandboxes/{sandbox}/pause")
    for path in ("processes", "metrics"):
        answer = await team.client.get(f"/v1/sandboxes/{sandbox}/{path}")
        assert _told(answer) == (409, "invalid_state")
    assert _told(await _start(team, sandbox, "true")) == (409, "invalid_state")


async def test_processes_show_in_the_metrics(team: Team, sandbox: str) -> None:
    answer = await team.client.get(f"/v1/sandboxes/{sandbox}/metrics")
    assert answer.status_code == 200
    assert answer.json()["cpu_count"] >= 1
    assert 0 < answer.json()["mem_used"] < answer.json()["mem_total"]
    assert 0 < answer.json()["disk_used"] < answer.json()["disk_total"]


async def test_what_was_said_before_is_replayed(team: Team, sandbox: str, port: int) -> None:
    script = "echo first; until [ -e go ]; do sleep 0.05; done; echo second; exit 5"
    started = (await _start(team, sandbox, script, tag="job")).json()
    for process in ("job", started["pid"]):
        async with talking(_url(port, sandbox, process), team.key) as peer:
            assert await peer.hear() == {"type": "start", "pid": started["pid"]}
            await peer.until("stdout", "first\n")
    async with talking(_url(port, sandbox, "job"), team.key) as peer:
        await peer.until("stdout", "first\n")
        body = {"cmd": "touch", "args": ["go"]}
        await team.client.post(f"/v1/sandboxes/{sandbox}/exec", json=body)
        frames = await peer.rest()
    assert output_of(frames) == "second\n"
    assert frames[-1] == {"type": "exit", "exit_code": 5}


async def test_the_end_is_kept_for_who_comes_late(team: Team, sandbox: str, port: int) -> None:
    pid = (await _start(team, sandbox, "echo all; echo err >&2; exit 9", tag="late")).json()["pid"]
    await _until_gone(team, sandbox, pid)
    async with talking(_url(port, sandbox, "late"), team.key) as peer:
        frames = await peer.rest()
    assert (output_of(frames), output_of(frames, "stderr")) == ("all\n", "err\n")
    assert frames[-1] == {"type": "exit", "exit_code": 9}


async def test_the_replay_is_bounded_and_ends_with_the_newest(
    team: Team, sandbox: str, port: int
) -> None:
    pid = (await _start(team, sandbox, "seq 1000000", tag="much")).json()["pid"]
    await _until_gone(team, sandbox, pid)
    async with talking(_url(port, sandbox, "much"), team.key) as peer:
        frames = await peer.rest()
    text = output_of(frames)
    assert text.endswith("999999\n1000000\n")
    assert 500_000 < len(text) < 1_200_000
    assert frames[-1] == {"type": "exit", "exit_code": 0}


async def test_a_client_that_goes_leaves_the_command(
    server: Server, team: Team, sandbox: str, port: int
) -> None:
    await _start(team, sandbox, "echo up; sleep 60", tag="stays")
    async with talking(_url(port, sandbox, "stays"), team.key) as peer:
        await peer.say(type="start", cmd="ignored")
        await peer.until("stdout", "up")
    await eventually(lambda: not server.plane.activity.users_of(SandboxId(sandbox)))
    assert [each["tag"] for each in await _list(team, sandbox)] == ["stays"]
    async with talking(_url(port, sandbox, "stays"), team.key) as peer:
        await peer.until("stdout", "up")
        await peer.say(type="stop")
        assert (await peer.rest())[-1] == {"type": "exit", "exit_code": 143}


async def test_processes_that_cannot_be_followed_are_told_apart(
    team: Team, sandbox: str, port: int
) -> None:
    for process in ("1", "nothing"):
        with pytest.raises(InvalidStatus) as caught:
            async with talking(_url(port, sandbox, process), team.key):
                pass
        assert caught.value.response.status_code == 404
        assert json.loads(caught.value.response.body or b"")["error"]["code"] == "not_found"
    answer = await team.client.get(f"/v1/sandboxes/{sandbox}/processes/1/stream")
    assert _told(answer) == (400, "invalid_request")


async def test_signals_reach_the_host(faulty: Server, user: Team, host: HostDouble) -> None:
    id = str((await user.client.post("/v1/sandboxes")).json()["id"])
    for process, query in (("12", ""), ("tag", "?signal=SIGTERM")):
        assert (await _signal(user, id, process, query)).status_code == 204
    assert host.signals == [(12, ProcessSignal.KILL), ("tag", ProcessSignal.TERM)]
