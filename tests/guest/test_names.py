"""/init as the first process of namespaces of its own: what it makes of the names of a machine.

Host name, mounts and processes are the agent's own there, and so is /etc. The clock is not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.agent_process import MAIN, PATIENCE, Agent

pytestmark = pytest.mark.root

_ENTER = """
mount --bind "$1" /etc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t tmpfs run /run
mkdir /run/.wrenn
[ ! -e /etc/template.json ] || mv /etc/template.json /run/.wrenn
shift
exec "$@"
"""
_NAMES = "hostname; cat /etc/hostname; hostname -f; cat /etc/machine-id"


class _FirstProcess(Agent):
    """An agent that takes itself for the first process of a VM with this /etc."""

    def __init__(self, etc: Path) -> None:
        self.home = etc
        self.headers: dict[str, str] = {}
        agent = [sys.executable, "-I", "-S", str(MAIN), "--vm", "--host", "127.0.0.1"]
        self.process = subprocess.Popen(
            [
                *("unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--mount", "--uts"),
                *("sh", "-ec", _ENTER, "sh", str(etc), *agent, "--port", "0"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where /proc/sys cannot be written, it says so
        )
        assert self.process.stdout is not None
        self.port = int(json.loads(self.process.stdout.readline())["port"])

    def end(self) -> None:
        # the agent itself: who has acted as another user does not die with its parent
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)

    def init(self, **message: str) -> None:
        assert self.request("POST", "/init", json.dumps(message).encode()).status == 204


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    path = tmp_path / "etc"
    path.mkdir()
    for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache"):
        if Path("/etc", name).exists():
            (path / name).write_bytes(Path("/etc", name).read_bytes())
    (path / "hosts").write_text("127.0.0.1 localhost\n")
    (path / "resolv.conf").write_text("nameserver 192.0.2.1\n")
    return path


@pytest.fixture
def first(etc: Path) -> Iterator[_FirstProcess]:
    agent = _FirstProcess(etc)
    yield agent
    agent.end()


def _told(agent: Agent) -> list[str]:
    result = agent.run("sh", "-c", _NAMES)
    assert result.exit_code == 0, result
    return result.stdout.decode().splitlines()


def test_all_names_agree_after_init(first: _FirstProcess, etc: Path) -> None:
    for number, name in enumerate(("template", "sb-one", "sb-two")):
        machine_id = str(number) * 32
        first.init(hostname=name, machineId=machine_id)
        assert _told(first) == [name, name, name, machine_id]
    assert (etc / "hosts").read_text().count("127.0.1.1") == 1


def test_a_machine_id_is_left_to_the_program_that_replaced_it(
    first: _FirstProcess, etc: Path
) -> None:
    first.init(hostname="sb-one", machineId="a" * 32)
    script = "cd /etc && sed -i s/a/b/g machine-id && mv machine-id x && mv x machine-id"
    assert first.run("sh", "-c", script).exit_code == 0
    inodes = [os.stat(etc / each).st_ino for each in ("hosts", "hostname", "machine-id")]
    first.init(hostname="sb-one", machineId="a" * 32)
    assert _told(first)[3] == "b" * 32
    assert [os.stat(etc / each).st_ino for each in ("hosts", "hostname", "machine-id")] == inodes
    first.init(hostname="sb-two", machineId="c" * 32)
    assert _told(first)[3] == "c" * 32


def test_init_works_on_a_root_that_cannot_be_written(first: _FirstProcess) -> None:
    first.init(hostname="sb-one", machineId="a" * 32)
    assert first.run("mount", "-o", "remount,bind,ro", "/etc").exit_code == 0
    for number, name in enumerate(("sb-two", "sb-three")):
        first.init(hostname=name, machineId=str(number) * 32)
        told = _told_by(first, "hostname; cat /etc/hostname /etc/machine-id")
        assert told == [name, "sb-one", str(number) * 32]
    mounts = _told_by(first, "grep -c ' /etc/machine-id ' /proc/mounts")
    assert mounts == ["1"]


@pytest.mark.parametrize(
    ("line", "uid"), [("user:x:1234:1234::/:/bin/sh\n", "1234"), ("", "0")], ids=["there", "gone"]
)
def test_commands_run_as_the_account_of_their_template(etc: Path, line: str, uid: str) -> None:
    with (etc / "passwd").open("a") as passwd:
        passwd.write(line)
    (etc / "wrenn-user").write_text("user\n")
    agent = _FirstProcess(etc)
    try:
        assert _told_by(agent, "id -u") == [uid]
    finally:
        agent.end()


@pytest.mark.parametrize(
    ("user", "told"),
    [
        ("user", "1234 77 77,88"),
        ("1234", "1234 77 77,88"),
        ("user:crew", "1234 88 88"),
        ("user:99", "1234 99 99"),
        ("4321", "4321 0 0"),
        ("4321:99", "4321 99 99"),
        ("0", "0 0 0"),
    ],
)
def test_a_user_of_an_image_is_a_name_or_number_and_perhaps_a_group(
    etc: Path, user: str, told: str
) -> None:
    with (etc / "passwd").open("a") as passwd:
        passwd.write("user:x:1234:77::/home/user:/bin/sh\n")
    with (etc / "group").open("a") as group:
        group.write("app:x:77:\ncrew:x:88:user\n")
    agent = _FirstProcess(etc)
    try:
        script = "echo $(id -u) $(id -g) $(id -G | tr ' ' ,)"
        result = agent.run("/bin/sh", "-c", script, user=user)
        assert result.stdout.decode().strip() == told
    finally:
        agent.end()


@pytest.mark.parametrize("user", ["nobody-here", "-1", "4294967295", "1:nothing", ":0", "1²"])
def test_a_user_that_is_no_account_and_no_number_is_refused(etc: Path, user: str) -> None:
    agent = _FirstProcess(etc)
    try:
        with agent.start("/bin/true", user=user) as stream:
            list(stream)
        assert stream.error is not None
        assert stream.error["code"] == "invalid_argument"
    finally:
        agent.end()


def test_commands_have_what_the_template_says_until_somebody_says_otherwise(etc: Path) -> None:
    said = {"user": "1234", "workdir": "/usr", "env": {"A": "image", "B": "image", "C": "image"}}
    (etc / "template.json").write_text(json.dumps(said))
    agent = _FirstProcess(etc)
    try:
        script = "echo $(id -u) $PWD $A $B $C"
        assert _told_by(agent, script) == ["1234 /usr image image image"]
        agent.request("POST", "/init", json.dumps({"envVars": {"B": "init", "C": "init"}}).encode())
        result = agent.run("sh", "-c", script, envs={"C": "own"}, cwd="/var")
        assert result.stdout == b"1234 /var image init own\n"
    finally:
        agent.end()


def test_a_working_directory_that_the_image_lacks_is_not_used(etc: Path) -> None:
    (etc / "template.json").write_text('{"user": "1234", "workdir": "/not/there"}')
    agent = _FirstProcess(etc)
    try:
        assert _told_by(agent, "pwd") == ["/"]
    finally:
        agent.end()


def _told_by(agent: Agent, script: str) -> list[str]:
    return agent.run("sh", "-c", script).stdout.decode().splitlines()
