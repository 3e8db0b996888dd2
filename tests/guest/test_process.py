"""process.Process: start, errors, end, signals, list."""

from __future__ import annotations

import base64
import os
import signal
import sys
import time
from typing import cast

import pytest

from support.agent_process import Agent, Json, process_message, signal_group
from support.proc import exists, wait_until
from wrenn_agent.process_service import KILL_SECONDS

START = "process.Process/Start"


def test_runs_a_command_and_tells_how_it_ended(agent: Agent) -> None:
    result = agent.run("sh", "-c", "echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    assert result.error is None
    assert result.end["exited"] is True
    assert (result.exit_code, result.end["status"]) == (3, "exit status 3")
    assert 0 < cast(float, result.end["durationMs"]) < 10_000


def test_success_has_no_error(agent: Agent) -> None:
    assert agent.run("true").end.items() >= {"exitCode": 0, "status": "exit status 0"}.items()
    assert "error" not in agent.run("true").end


def test_a_process_gets_environment_and_directory(agent: Agent) -> None:
    result = agent.run("sh", "-c", "pwd; env", envs={"GREETING": "hé\nllo", "PATH": "/bin"})
    lines = result.stdout.decode()
    assert lines.startswith(f"{agent.home}\n")
    for line in (
        f"HOME={agent.home}",
        "USER=root",
        "LOGNAME=root",
        "GREETING=hé\nllo",
        "PATH=/bin",
    ):
        assert line + "\n" in lines
    assert "SHELL=/" in lines


def test_directory_may_be_relative_to_home(agent: Agent) -> None:
    (agent.home / "project" / "sub dir").mkdir(parents=True)
    for cwd in ("project/sub dir", "~/project/sub dir", str(agent.home / "project" / "sub dir")):
        assert agent.run("pwd", cwd=cwd).stdout.decode() == f"{agent.home}/project/sub dir\n"
    assert agent.run("./../x", cwd="project/sub dir").error is not None


def test_a_process_runs_as_another_user(agent: Agent) -> None:
    uid = b"65534" if os.geteuid() == 0 else str(os.geteuid()).encode()
    script = "id -u; echo $USER $HOME; grep Uid: /proc/self/status"
    result = agent.run("sh", "-c", script, user="nobody", cwd="/")
    assert result.stdout.splitlines() == [
        uid,
        b"nobody /nonexistent",
        b"Uid:\t" + b"\t".join([uid] * 4),
    ]
    header = {"Authorization": "Basic " + base64.b64encode(b"nobody:").decode()}
    with agent.stream(START, process_message("id", "-u", cwd="/"), headers=header) as stream:
        assert stream.collect().stdout == uid + b"\n"
    assert int(agent.run("id", "-u").stdout) == os.geteuid()


def test_signals_have_their_default_meaning(agent: Agent) -> None:
    script = (
        "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
        "import os; print(sorted(os.listdir('/proc/self/fd'))[:4], signal.pthread_sigmask(0, []))"
    )
    result = agent.run(sys.executable, "-S", "-c", script)
    assert result.stdout.decode().splitlines() == ["True", "['0', '1', '2', '3'] set()"]
    broken = agent.run("bash", "-c", "yes | head -1; echo ${PIPESTATUS[0]}")
    assert broken.stdout == b"y\n141\n"


@pytest.mark.parametrize(
    ("process", "code"),
    [
        ({"cmd": "no-such-command"}, "not_found"),
        ({"cmd": "/no/such/command"}, "not_found"),
        ({"cmd": "/etc/passwd"}, "permission_denied"),
        ({"cmd": "/etc"}, "permission_denied"),
        ({"cmd": ""}, "invalid_argument"),
        ({}, "invalid_argument"),
        ({"cmd": "tr\0ue"}, "invalid_argument"),
        ({"cmd": "true", "args": ["\0"]}, "invalid_argument"),
        ({"cmd": "true", "args": ["\ud800"]}, "invalid_argument"),
        ({"cmd": "true", "args": "x"}, "invalid_argument"),
        ({"cmd": "true", "args": [1]}, "invalid_argument"),
        ({"cmd": "true", "envs": {"a=b": "c"}}, "invalid_argument"),
        ({"cmd": "true", "envs": {"a": 1}}, "invalid_argument"),
        ({"cmd": "true", "cwd": "/no/such"}, "invalid_argument"),
        ({"cmd": "true", "cwd": "/etc/passwd"}, "invalid_argument"),
        ({"cmd": "true", "user": "no-such-user"}, "invalid_argument"),
        ({"cmd": "true", "args": ["x" * 200_000]}, "invalid_argument"),
    ],
)
def test_refuses_what_cannot_be_started(agent: Agent, process: Json, code: str) -> None:
    with agent.stream(START, {"process": process}) as stream:
        assert list(stream) == []
    assert stream.error is not None
    assert stream.error["code"] == code
    assert stream.error["message"]


def test_script_without_interpreter_line_is_not_executable(agent: Agent) -> None:
    script = agent.home / "script"
    script.write_text("echo hello\n")
    script.chmod(0o755)
    result = agent.run(str(script))
    assert result.error is not None
    assert result.error["code"] == "permission_denied"


def test_lingering_grandchild_delays_the_end_a_little(agent: Agent) -> None:
    started = time.monotonic()
    result = agent.run("sh", "-c", "sleep 30 & echo $!")
    assert 0.3 < time.monotonic() - started < 5
    assert result.exit_code == 0
    assert cast(float, result.end["durationMs"]) < 490
    os.kill(int(result.stdout), signal.SIGKILL)


def test_chatty_grandchild_cannot_hold_the_end_back(agent: Agent) -> None:
    started = time.monotonic()
    result = agent.run("sh", "-c", "(while echo y; do :; done) & echo pid=$! >&2")
    assert time.monotonic() - started < 5
    assert result.exit_code == 0
    grandchild = int(result.stderr.split(b"=")[1])
    assert exists(grandchild)
    os.kill(grandchild, signal.SIGKILL)


def test_double_fork_is_reaped(agent: Agent) -> None:
    result = agent.run("sh", "-c", "(sleep 0.1 & echo $!) | cat")
    orphan = int(result.stdout)
    wait_until(lambda: not exists(orphan))


def test_many_processes_dying_at_once(agent: Agent) -> None:
    script = "for i in $(seq 200); do sleep 60 & done; echo ready; wait"
    with agent.start("bash", "-c", script) as stream:
        pid = stream.started()
        stream.read_until(b"ready")
        assert signal_group(agent, pid, "SIGNAL_SIGKILL") == 200
        assert stream.collect().exit_code == 137
    assert agent.run("echo", "alive").stdout == b"alive\n"


@pytest.mark.parametrize(
    ("number", "words"), [(9, "killed"), (11, "segmentation fault"), (15, "terminated"), (31, "31")]
)
def test_signals_have_words_up_to_sigterm_and_numbers_beyond(
    agent: Agent, number: int, words: str
) -> None:
    with agent.start("sh", "-c", f"ulimit -c 0; kill -{number} $$") as stream:
        assert stream.collect().end["status"] == f"signal: {words}"


@pytest.mark.parametrize(
    ("name", "number", "words"), [("SIGKILL", 9, "killed"), ("SIGTERM", 15, "terminated")]
)
def test_signal_goes_to_the_whole_group(agent: Agent, name: str, number: int, words: str) -> None:
    with agent.start("sh", "-c", "sleep 60 & echo $!; wait") as stream:
        pid = stream.started()
        child = int(stream.read_until(b"\n"))
        assert os.getsid(child) == pid
        assert signal_group(agent, pid, f"SIGNAL_{name}") == 200
        result = stream.collect()
    expected = {
        "exitCode": 128 + number,
        "exited": False,
        "status": f"signal: {words}",
        "signal": number,
    }
    assert result.end.items() >= expected.items()
    wait_until(lambda: not exists(child))


def test_what_is_killed_is_gone_when_it_is_answered(agent: Agent) -> None:
    for number in range(20):
        with agent.start("sh", "-c", "echo; exec sleep 60", tag=f"victim-{number}") as stream:
            pid = stream.started()
            stream.read_until(b"\n")
            assert signal_group(agent, pid, "SIGNAL_SIGKILL") == 200
            assert not exists(pid)
            assert pid not in agent.pids()


def test_a_kill_does_not_wait_for_those_who_read_slowly(agent: Agent) -> None:
    with agent.start("sh", "-c", "yes & exec cat /dev/zero") as stream:
        pid = stream.started()
        time.sleep(0.5)
        started = time.monotonic()
        assert signal_group(agent, pid, "SIGNAL_SIGKILL") == 200
        assert time.monotonic() - started < KILL_SECONDS + 1
        assert not exists(pid)


def test_an_unknown_user(agent: Agent) -> None:
    stranger = {"Authorization": "Basic " + base64.b64encode(b"stranger:").decode()}
    reply = agent.call("filesystem.Filesystem/Stat", {"path": "/"}, stranger)
    assert (reply.status, reply.json()["code"]) == (401, "unauthenticated")
    message = process_message("true")
    with agent.stream("process.Process/Start", message, headers=stranger) as stream:
        assert list(stream) == []
    assert stream.error is not None
    assert stream.error["code"] == "unauthenticated"


def test_signal_to_unknown_process(agent: Agent) -> None:
    assert signal_group(agent, 999_999_999, "SIGNAL_SIGKILL") == 404
    with agent.start("sleep", "60") as stream:
        pid = stream.started()
        assert signal_group(agent, pid, "SIGNAL_SIGHUP") == 400
        assert signal_group(agent, pid, "SIGNAL_SIGKILL") == 200
        stream.collect()
    assert signal_group(agent, pid, "SIGNAL_SIGKILL") == 404


def test_list_shows_what_runs(agent: Agent) -> None:
    with agent.start("sleep", "60", tag="nap", envs={"A": "b"}, cwd="/") as stream:
        pid = stream.started()
        reply = agent.call("process.Process/List", {})
        processes = cast(list[Json], reply.json()["processes"])
        config = {"cmd": "sleep", "args": ["60"], "envs": {"A": "b"}, "cwd": "/"}
        assert {"config": config, "pid": pid, "tag": "nap"} in processes
        signal_group(agent, pid, "SIGNAL_SIGKILL")
        stream.collect()
    assert pid not in agent.pids()
