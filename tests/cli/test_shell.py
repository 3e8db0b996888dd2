"""`wrenn sandbox shell` on a real terminal, against a real server on the fake driver."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from support.served import Served, serving
from support.terminal_screen import Screen
from wrenn_sandbox.client import Sandbox

pytestmark = pytest.mark.slow

_SHELL = [sys.executable, "-m", "wrenn_sandbox", "sandbox", "shell"]
_PROMPT = r"[#$] "


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("shell")) as served:
        yield served


@pytest.fixture
def sandbox(served: Served) -> Iterator[Sandbox]:
    with served.client() as client, client.sandboxes.create() as sandbox:
        yield sandbox


@pytest.fixture
def environment(served: Served, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "WRENN_URL": served.url,
        "WRENN_API_KEY": served.key,
        "XDG_CONFIG_HOME": str(tmp_path),
        "TERM": "xterm",
    }


@pytest.fixture
def screen(sandbox: Sandbox, environment: Mapping[str, str]) -> Iterator[Screen]:
    """A terminal where a shell of the sandbox waits for input."""
    with Screen([*_SHELL, sandbox.id], environment) as screen:
        screen.expect(_PROMPT)
        yield screen


def test_a_shell_session_shows_what_is_typed_and_ends(
    sandbox: Sandbox, environment: Mapping[str, str]
) -> None:
    with Screen([*_SHELL, sandbox.id], environment) as screen:
        before = screen.mode()
        screen.expect(_PROMPT)
        assert screen.mode() != before
        screen.type("echo $TERM $((6 * 7)) ünï\r")
        screen.expect("xterm 42 ünï\r\n")
        screen.expect(_PROMPT)
        screen.type("exit 7\r")
        assert screen.wait() == 7
        assert screen.mode() == before


def test_the_shell_follows_a_file_until_interrupted(sandbox: Sandbox, screen: Screen) -> None:
    sandbox.files.write("log", "first line\n")
    screen.type("tail -f log\r")
    screen.expect("first line\r\n")
    sandbox.exec("sh", "-c", "echo second line >> log").check()
    screen.expect("second line\r\n")
    screen.type("\x03")
    screen.expect(_PROMPT)
    screen.type("echo code $?\r")
    screen.expect("code 130\r\n")


def test_the_shell_runs_an_interactive_python(screen: Screen) -> None:
    screen.type("PYTHON_BASIC_REPL=1 python3 -i -q\r")
    screen.expect(">>> ")
    screen.type("21 * 2\r")
    screen.expect("42\r\n>>> ")
    # a loop: a sleep that begins just after the signal has come is not interrupted
    screen.type("print('running'); all(iter(lambda: True, False))\r")
    screen.expect("running\r\n")
    screen.type("\x03")
    screen.expect("KeyboardInterrupt\r\n.*>>> ")
    screen.type("\x04")
    screen.expect(_PROMPT)


def test_the_shell_passes_the_size_of_the_window(
    sandbox: Sandbox, environment: Mapping[str, str]
) -> None:
    with Screen([*_SHELL, sandbox.id], environment, cols=71, rows=19) as screen:
        screen.expect(_PROMPT)
        screen.type("stty size; trap 'echo now $(stty size)' WINCH\r")
        screen.expect("19 71\r\n.*" + _PROMPT)
        screen.resize(132, 43)
        screen.expect("now 43 132\r\n")


def test_suspending_a_job(screen: Screen) -> None:
    screen.type("sh -c 'echo running; exec sleep 600'\r")
    screen.expect("running\r\n")
    screen.type("\x1a")
    screen.expect("Stopped")
    screen.expect(_PROMPT)
    screen.type("kill %1\r")
    screen.expect(_PROMPT)


def test_a_command_of_the_callers(sandbox: Sandbox, environment: Mapping[str, str]) -> None:
    argv = [*_SHELL, sandbox.id, "--", "sh", "-c", "test -t 0 && test -t 1 && exit 23"]
    with Screen(argv, environment) as screen:
        assert screen.wait() == 23


def test_much_at_once(screen: Screen) -> None:
    screen.type("seq 200000; echo done\r")
    screen.expect("199999\r\n200000\r\ndone\r\n", 60)


def test_the_shell_comes_back_to_a_lost_terminal(
    sandbox: Sandbox, screen: Screen, environment: Mapping[str, str]
) -> None:
    screen.type("kept=this\r")
    screen.expect(_PROMPT)
    screen.kill()
    (process,) = sandbox.processes.list()
    assert process.tag is not None
    with Screen([*_SHELL, "--connect", process.tag, sandbox.id], environment, cols=99) as again:
        again.type("echo $kept; stty size\r")
        again.expect("this\r\n24 99\r\n")
        again.type("exit\r")
        assert again.wait() == 0


def test_a_sandbox_that_ends(sandbox: Sandbox, screen: Screen) -> None:
    sandbox.delete()
    assert screen.wait() == 125
    assert b"wrenn: The sandbox is " in screen.shown


def test_the_shell_ends_when_its_server_goes_away(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    with serving(tmp_path) as served, served.client() as client:
        sandbox = client.sandboxes.create()
        environment |= {"WRENN_URL": served.url, "WRENN_API_KEY": served.key}
        with Screen([*_SHELL, sandbox.id], environment) as screen:
            before = screen.mode()
            screen.expect(_PROMPT)
            served.server.kill()
            assert screen.wait() == 125
            screen.expect(f"--connect \\S+ {sandbox.id}\r\n")
            assert screen.mode() == before


def test_without_a_sandbox(served: Served, environment: Mapping[str, str]) -> None:
    with Screen([*_SHELL, "sb-nothere"], environment) as screen:
        before = screen.mode()
        assert screen.wait() == 125
        assert screen.shown.strip().startswith(
            b"wrenn: There is no such sandbox: wrenn sandbox list"
        )
        assert screen.mode() == before


def test_without_a_terminal(sandbox: Sandbox, environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        [*_SHELL, sandbox.id],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 125
    assert "wrenn sandbox exec" in done.stderr
