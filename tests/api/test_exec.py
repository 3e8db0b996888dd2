"""Commands through the API, on real processes."""

import base64
from collections.abc import Callable

import httpx2
import pytest

from support.api_server import Server, Team
from support.host_double import HostDouble
from wrenn_sandbox.errors import AgentError, InvalidRequest, NotFound
from wrenn_sandbox.wire.messages import Command, CommandResult

pytestmark = pytest.mark.parametrize("database_url", [None])
"""What a command does is the same on every database."""


@pytest.fixture
async def sandbox(team: Team) -> str:
    return str((await team.client.post("/v1/sandboxes")).json()["id"])


@pytest.fixture
async def doubled(user: Team) -> str:
    """A sandbox on the host that answers what the test says."""
    return str((await user.client.post("/v1/sandboxes")).json()["id"])


async def _exec(team: Team, id: str, **body: object) -> httpx2.Response:
    return await team.client.post(f"/v1/sandboxes/{id}/exec", json=body)


def _result(**values: object) -> Callable[[Command], CommandResult]:
    fields = {"exit_code": 0, "stdout": b"", "stderr": b"", "duration_ms": 1, **values}
    return lambda _: CommandResult(**fields)  # type: ignore[arg-type]


async def test_a_command_runs_to_its_end(team: Team, sandbox: str) -> None:
    answer = await _exec(team, sandbox, cmd="sh", args=["-c", "echo out; echo err >&2; exit 3"])
    assert answer.status_code == 200
    result = answer.json()
    assert result.pop("duration_ms") >= 0
    assert result == {
        "sandbox_id": sandbox,
        "cmd": "sh",
        "stdout": "out\n",
        "stderr": "err\n",
        "exit_code": 3,
        "encoding": "utf-8",
        "truncated": False,
    }


async def test_arguments_are_not_interpreted(team: Team, sandbox: str) -> None:
    arguments = ["$HOME", "a b", "", "'\"", "ü🦜", "*"]
    answer = await _exec(team, sandbox, cmd="printf", args=["%s|", *arguments])
    assert answer.json()["stdout"] == "".join(f"{each}|" for each in arguments)


async def test_exec_takes_environment_and_directory(team: Team, sandbox: str) -> None:
    answer = await _exec(
        team, sandbox, cmd="sh", args=["-c", "echo $COLOUR; pwd"], envs={"COLOUR": "grün"}, cwd="/"
    )
    assert answer.json()["stdout"] == "grün\n/\n"


async def test_exec_of_an_unknown_program_says_so(team: Team, sandbox: str) -> None:
    answer = await _exec(team, sandbox, cmd="no-such-program")
    assert (answer.status_code, answer.json()["exit_code"]) == (200, 127)


async def test_binary_output_comes_as_base64(team: Team, sandbox: str) -> None:
    answer = await _exec(team, sandbox, cmd="printf", args=[r"\377\000a"])
    assert answer.json()["encoding"] == "base64"
    assert base64.b64decode(answer.json()["stdout"]) == b"\xff\x00a"
    assert answer.json()["stderr"] == ""


async def test_exec_over_its_time_answers_with_its_output(team: Team, sandbox: str) -> None:
    answer = await _exec(
        team, sandbox, cmd="sh", args=["-c", "echo begun; sleep 60"], timeout_sec=1
    )
    assert answer.status_code == 504
    error = answer.json()["error"]
    assert (error["code"], error["stdout"], error["stderr"]) == ("exec_timeout", "begun\n", "")


_BAD_COMMANDS: list[tuple[dict[str, object], str]] = [
    ({}, "cmd"),
    ({"cmd": ""}, "cmd"),
    ({"cmd": None}, "cmd"),
    ({"cmd": ["ls"]}, "cmd"),
    ({"cmd": "a\0b"}, "cmd"),
    ({"cmd": "ls", "args": "-l"}, "args"),
    ({"cmd": "ls", "args": ["a", 1]}, "args"),
    ({"cmd": "ls", "args": ["\0"]}, "args"),
    ({"cmd": "ls", "timeout_sec": 0}, "timeout_sec"),
    ({"cmd": "ls", "timeout_sec": 3601}, "timeout_sec"),
    ({"cmd": "ls", "timeout_sec": "30"}, "timeout_sec"),
    ({"cmd": "ls", "envs": {"A=B": ""}}, "envs"),
    ({"cmd": "ls", "envs": {"": ""}}, "envs"),
    ({"cmd": "ls", "envs": {"A": "\0"}}, "envs"),
    ({"cmd": "ls", "envs": {"A": 1}}, "envs"),
    ({"cmd": "ls", "cwd": "\0"}, "cwd"),
    ({"cmd": "ls", "user": 0}, "user"),
]


async def test_a_request_that_is_not_acceptable(faulty: Server, user: Team, doubled: str) -> None:
    for body, field in _BAD_COMMANDS:
        answer = await _exec(user, doubled, **body)
        assert answer.status_code == 400
        assert field in answer.json()["error"]["message"]


async def test_what_the_host_is_asked_for(
    host: HostDouble, faulty: Server, user: Team, doubled: str
) -> None:
    body = {"cmd": "c", "args": ["a"], "envs": {"K": "v"}, "cwd": "/tmp", "user": "ada"}
    await _exec(user, doubled, **body)
    assert host.commands == [Command(cmd="c", args=("a",), envs={"K": "v"}, cwd="/tmp", user="ada")]


async def test_cut_output_is_text_still(
    host: HostDouble, faulty: Server, user: Team, doubled: str
) -> None:
    host.answer = _result(stdout="aü".encode()[:-1], truncated=True)
    result = (await _exec(user, doubled, cmd="c")).json()
    assert (result["stdout"], result["encoding"], result["truncated"]) == ("a", "utf-8", True)


async def test_binary_output_of_a_command_over_its_time(
    host: HostDouble, faulty: Server, user: Team, doubled: str
) -> None:
    host.answer = _result(stdout=b"\xffx", stderr=b"e", timed_out=True)
    error = (await _exec(user, doubled, cmd="c")).json()["error"]
    assert error["encoding"] == "base64"
    assert base64.b64decode(error["stdout"]) == b"\xffx"
    assert base64.b64decode(error["stderr"]) == b"e"


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (AgentError("The guest did not answer"), 502, "agent_error"),
        (NotFound("It does not run here"), 502, "agent_error"),
        (InvalidRequest("user: there is no such user"), 400, "invalid_request"),
    ],
)
async def test_failures_of_the_host(
    host: HostDouble,
    faulty: Server,
    user: Team,
    doubled: str,
    failure: Exception,
    status: int,
    code: str,
) -> None:
    host.fail["exec"] = failure
    answer = await _exec(user, doubled, cmd="c")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_a_defect_is_not_shown_to_callers(
    host: HostDouble, faulty: Server, user: Team, doubled: str
) -> None:
    host.fail["exec"] = RuntimeError("/secret/path")
    client = faulty.client({"X-API-Key": user.key}, checked=False)
    answer = await client.post(f"/v1/sandboxes/{doubled}/exec", json={"cmd": "c"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]


async def test_a_command_in_a_sandbox_that_is_deleted_meanwhile(
    host: HostDouble, faulty: Server, user: Team, doubled: str
) -> None:
    gate = host.hold("exec")
    running = faulty.start(_exec(user, doubled, cmd="c"))
    await gate.arrived.wait()
    assert (await user.client.delete(f"/v1/sandboxes/{doubled}")).status_code == 204
    gate.opened.set()
    answer = await running
    assert answer.status_code == 409
    assert "stopped" in answer.json()["error"]["message"]
