"""`wrenn sandbox shell` into a real machine, on a real terminal."""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from support.terminal_screen import Screen
from support.vm.rig import Api
from support.vm.rig import Sandbox as Machine
from wrenn_sandbox.client import Client, Sandbox

pytestmark = pytest.mark.vm

_PROMPT = r"[#$] "


@pytest.fixture
def sandbox(api: Api, sandbox: Machine) -> Iterator[Sandbox]:
    """The module's machine, through the client."""
    with Client(api.server.url, api_key=api.http.headers["X-API-Key"]) as client:
        yield client.sandboxes.get(sandbox.id)


@pytest.fixture
def environment(api: Api, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "WRENN_URL": api.server.url,
        "WRENN_API_KEY": api.http.headers["X-API-Key"],
        "XDG_CONFIG_HOME": str(tmp_path),
        "TERM": "xterm",
    }


@pytest.fixture
def screen(sandbox: Sandbox, environment: Mapping[str, str]) -> Iterator[Screen]:
    """A terminal where a shell of the machine waits for input."""
    argv = [sys.executable, "-m", "wrenn_sandbox", "sandbox", "shell", sandbox.id]
    with Screen(argv, environment) as screen:
        screen.expect(_PROMPT)
        yield screen


def test_a_shell_in_a_vm_follows_a_file_until_interrupted(sandbox: Sandbox, screen: Screen) -> None:
    screen.type("echo first line > log; tail -f log\r")
    screen.expect("[\r\n]first line\r\n")
    sandbox.exec("sh", "-c", "echo second line >> log").check()
    screen.expect("second line\r\n")
    screen.type("\x03")
    screen.expect(_PROMPT)
    screen.type("exit 7\r")
    assert screen.wait() == 7


def test_a_shell_in_a_vm_runs_an_interactive_python(screen: Screen) -> None:
    screen.type("python3 -i -q\r")
    screen.expect(">>> ")
    screen.type("import platform; platform.system() * 2\r")
    screen.expect("'LinuxLinux'\r\n>>> ")
    # a loop: a sleep that begins just after the signal has come is not interrupted
    screen.type("print('running'); all(iter(lambda: True, False))\r")
    screen.expect("running\r\n")
    screen.type("\x03")
    screen.expect("KeyboardInterrupt\r\n.*>>> ")
    screen.type("\x04")
    screen.expect(_PROMPT)


def test_a_shell_in_a_vm_runs_an_editor(sandbox: Sandbox, screen: Screen) -> None:
    screen.type("vi edited\r")
    # it takes the whole window: every line without text is a tilde
    screen.expect("(~.*){20}")
    screen.type("iwritten in vi\x1b")
    screen.expect("written in vi")
    screen.type(":wq\r")
    screen.expect(_PROMPT)
    assert sandbox.files.read("edited") == b"written in vi\n"


def test_a_program_that_redraws(screen: Screen) -> None:
    screen.type("top -d 0.5\r")
    screen.expect("load average.*PID.*COMMAND")
    # and again, without a key having been pressed
    screen.expect("load average|top - ")
    screen.type("q")
    screen.expect(_PROMPT)


def test_a_shell_in_a_vm_gets_the_size_of_the_window(screen: Screen) -> None:
    screen.type("stty size; trap 'echo now $(stty size)' WINCH\r")
    screen.expect("24 80\r\n.*" + _PROMPT)
    screen.resize(132, 43)
    screen.expect("now 43 132\r\n")
    screen.type("top -b -n 1 | head -1\r")
    screen.expect("load average.*" + _PROMPT)


def test_a_shell_in_a_vm_comes_back_to_a_lost_terminal(
    sandbox: Sandbox, screen: Screen, environment: Mapping[str, str]
) -> None:
    screen.type("kept=this; echo $((40 + 2))\r")
    screen.expect("[\r\n]42\r\n.*" + _PROMPT)
    tag = max(sandbox.processes.list(), key=lambda each: each.pid).tag
    assert tag is not None
    screen.kill()
    argv = [sys.executable, "-m", "wrenn_sandbox", "sandbox", "shell"]
    with Screen([*argv, "--connect", tag, sandbox.id], environment, cols=99) as again:
        again.type("echo $kept; stty size\r")
        again.expect("this\r\n24 99\r\n")
        again.type("exit 3\r")
        assert again.wait() == 3


def test_through_a_pause(sandbox: Sandbox, screen: Screen, environment: Mapping[str, str]) -> None:
    """The connection ends with a reason and a way back; what ran in the terminal goes on."""
    screen.type("kept=this; echo $((40 + 2))\r")
    screen.expect("[\r\n]42\r\n.*" + _PROMPT)
    sandbox.pause()
    assert screen.wait() == 125
    tag = screen.expect(r"wrenn sandbox shell --connect (\S+) ")[1].decode()
    sandbox.resume()
    argv = [sys.executable, "-m", "wrenn_sandbox", "sandbox", "shell"]
    with Screen([*argv, "--connect", tag, sandbox.id], environment) as again:
        again.type("echo still $kept; exit 4\r")
        again.expect("still this\r\n")
        assert again.wait() == 4
