"""Commands in a real machine, with every way they can go wrong."""

import base64
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.vm.rig import Api, Sandbox, error_of
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.vm

_MIB = 1024 * 1024


def test_what_a_caller_gets_by_default(api: Api, sandbox: Sandbox) -> None:
    script = "pwd; id -un; echo $HOME; command -v ip; readlink /proc/self/fd/0; wc -c"
    result = api.exec(sandbox.id, "sh", "-c", script)
    directory, user, home, tool, stdin, size = result.stdout.split()
    assert (directory, user, home) == ("/root", "root", "/root")
    assert tool.endswith("/ip")
    assert (stdin, size) == ("/dev/null", "0")
    assert result.encoding == "utf-8"
    assert not result.truncated


def test_arguments_arrive_without_a_shell(api: Api, sandbox: Sandbox) -> None:
    arguments = ["two words", "$HOME", "*", "", "ünï\n"]
    result = api.exec(sandbox.id, "printf", "%s|", *arguments)
    assert result.stdout == "|".join(arguments) + "|"


def test_both_streams_are_kept_apart(api: Api, sandbox: Sandbox) -> None:
    result = api.exec(sandbox.id, "sh", "-c", "echo out; echo err >&2")
    assert (result.stdout, result.stderr) == ("out\n", "err\n")


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_the_exit_code(api: Api, sandbox: Sandbox, code: int) -> None:
    assert api.exec(sandbox.id, "sh", "-c", f"exit {code}").exit_code == code


@pytest.mark.parametrize(("signal", "number"), [("KILL", 9), ("TERM", 15), ("SEGV", 11)])
def test_the_exit_code_of_a_killed_command(
    api: Api, sandbox: Sandbox, signal: str, number: int
) -> None:
    assert api.exec(sandbox.id, "sh", "-c", f"kill -{signal} $$").exit_code == 128 + number


@pytest.mark.parametrize("command", ["no-such-command", "/no/such/command"])
def test_an_unknown_program_in_a_vm_is_told(api: Api, sandbox: Sandbox, command: str) -> None:
    assert api.exec(sandbox.id, command).exit_code == 127


@pytest.mark.parametrize("command", ["/etc/passwd", "/etc"])
def test_a_program_that_cannot_be_executed_is_told(
    api: Api, sandbox: Sandbox, command: str
) -> None:
    assert api.exec(sandbox.id, command).exit_code == 126


def test_a_command_in_a_vm_gets_environment_directory_and_user(api: Api, sandbox: Sandbox) -> None:
    result = api.exec(
        sandbox.id,
        "sh",
        "-c",
        'echo "$GREETING"; pwd; id -un',
        envs={"GREETING": "hé llo"},
        cwd="/tmp",
        user="nobody",
    )
    assert result.stdout.splitlines() == ["hé llo", "/tmp", "nobody"]


@pytest.mark.parametrize(
    "fields", [{"user": "no-such-user"}, {"cwd": "/no/such/directory"}, {"cwd": "/etc/passwd"}]
)
def test_an_unknown_user_or_directory(
    api: Api, sandbox: Sandbox, fields: dict[str, object]
) -> None:
    answer = api.exec_raw(sandbox.id, "true", **fields)
    assert answer.status_code == 400
    assert error_of(answer).code == "invalid_request"


def test_binary_output_arrives_as_it_is(api: Api, sandbox: Sandbox) -> None:
    result = api.exec(sandbox.id, "printf", r"\377\000\001")
    assert result.encoding == "base64"
    assert base64.b64decode(result.stdout) == b"\xff\x00\x01"


def test_output_beyond_the_limit(api: Api, sandbox: Sandbox) -> None:
    script = f"head -c {12 * _MIB} /dev/zero | tr '\\0' x; echo short >&2; exit 3"
    result = api.exec(sandbox.id, "sh", "-c", script, timeout_sec=300)
    assert result.truncated
    assert len(result.stdout) == 10 * _MIB
    assert result.stderr == "short\n"
    assert result.exit_code == 3


def test_a_command_that_forks_and_lingers(api: Api, sandbox: Sandbox) -> None:
    begin = time.monotonic()
    result = api.exec(sandbox.id, "sh", "-c", "sleep 600 & echo started")
    assert result.stdout == "started\n"
    assert time.monotonic() - begin < 5


def test_a_command_over_its_time_is_ended_in_the_vm(api: Api, sandbox: Sandbox) -> None:
    script = "echo partial; echo trouble >&2; sleep 987 & sleep 987"
    answer = api.exec_raw(sandbox.id, "sh", "-c", script, timeout_sec=1)
    assert answer.status_code == 504
    error = error_of(answer)
    assert error.code == "exec_timeout"
    assert error.stdout == "partial\n"
    assert error.stderr == "trouble\n"
    # the whole process group is gone, the grandchild too
    assert api.exec(sandbox.id, "pgrep", "-f", "^sleep 987").exit_code == 1


def test_the_duration_is_the_guests(api: Api, sandbox: Sandbox) -> None:
    result = api.exec(sandbox.id, "sleep", "0.5")
    assert 480 <= result.duration_ms < patience(2000)


def test_many_commands_at_once(api: Api, sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(8) as pool:
        outputs = pool.map(lambda n: api.output(sandbox.id, f"echo {n}; sleep 0.1"), range(24))
        assert list(outputs) == [str(n) for n in range(24)]


def test_a_process_that_dies_of_memory_does_not_take_the_agent(api: Api, sandbox: Sandbox) -> None:
    result = api.exec(sandbox.id, "python3", "-c", "x = bytearray(2**40)")
    assert result.exit_code == 1
    result = api.exec(
        sandbox.id, "python3", "-c", "x = [bytearray(2**20) for _ in range(4096)]", timeout_sec=120
    )
    assert result.exit_code in (1, 137)
    assert api.output(sandbox.id, "echo alive") == "alive"


def test_what_a_command_leaves_running_in_a_vm_goes_on(api: Api, sandbox: Sandbox) -> None:
    """Its pipes are drained after the answer: neither a script nor a server gets EPIPE."""
    script = "sh -c 'sleep 1; echo a; echo ok >/tmp/ok' & echo started"
    assert api.output(sandbox.id, script) == "started"
    api.output(sandbox.id, "cd /etc && python3 -m http.server 8000 & echo up")
    fetch = "curl -fsS --retry 9 --retry-connrefused --retry-delay 1 http://127.0.0.1:8000/hostname"
    for _ in range(2):
        assert api.output(sandbox.id, fetch) == api.output(sandbox.id, "hostname")
    assert api.output(sandbox.id, "cat /tmp/ok") == "ok"
