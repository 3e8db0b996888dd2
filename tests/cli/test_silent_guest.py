"""A guest that takes connections and answers nothing: whoever waits for it is told so in time."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.served import Served, serving
from wrenn_sandbox.client import (
    AgentError,
    AsyncClient,
    AsyncSandbox,
    Client,
    ConnectionFailed,
    ExecTimeout,
    Sandbox,
)

pytestmark = pytest.mark.slow

_WRENN = [sys.executable, "-m", "wrenn_sandbox"]
_LIMIT = 1
_MARGIN = 15.0
"""Five seconds of grace, as many to ask the guest once more, and what a busy machine takes."""
_STOP = 14.0
"""A command that was told to end has ten seconds, and its caller what a busy machine takes."""


class Guest:
    """A sandbox and its agent, which stops and goes on when told."""

    def __init__(self, sandbox: Sandbox, agent: int) -> None:
        self.sandbox = sandbox
        self._agent = agent

    def stop(self) -> None:
        os.kill(self._agent, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._agent, signal.SIGCONT)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("silent")) as served:
        yield served


@pytest.fixture
def guest(served: Served) -> Iterator[Guest]:
    before = _children(served.server.pid)
    with served.client() as client, client.sandboxes.create() as sandbox:
        [agent] = _children(served.server.pid) - before
        guest = Guest(sandbox, agent)
        try:
            yield guest
        finally:
            guest.go_on()


def _children(pid: int) -> set[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {int(each) for task in tasks for each in (task / "children").read_text().split()}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def _wrenn(
    served: Served, *arguments: str, stdin: int = subprocess.DEVNULL
) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "WRENN_URL": served.url, "WRENN_API_KEY": served.key}
    return subprocess.Popen(
        [*_WRENN, *arguments],
        env=environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _stopped_in_the_middle(guest: Guest) -> None:
    with guest.sandbox.exec_stream("sleep", "60", timeout_sec=_LIMIT) as stream:
        guest.stop()
        stream.wait()


def _ran_out(sandbox: Sandbox, cmd: str) -> None:
    with sandbox.exec_stream(cmd, "60", timeout_sec=_LIMIT) as stream:
        stream.wait()


def test_exec_in_a_silent_guest_ends_in_time(guest: Guest) -> None:
    guest.stop()
    with within(_LIMIT + _MARGIN), pytest.raises(AgentError, match="not responding"):
        guest.sandbox.exec("true", timeout_sec=_LIMIT)


def test_exec_of_a_command_that_runs(guest: Guest) -> None:
    seconds = 2
    with within(seconds + _MARGIN):
        timer = threading.Timer(1.0, guest.stop)
        timer.start()
        with pytest.raises(ExecTimeout, match="not known"):
            guest.sandbox.exec("sleep", "60", timeout_sec=seconds)
        timer.join()


def test_a_stream_of_a_silent_guest_ends_in_time(guest: Guest) -> None:
    guest.stop()
    with (
        within(_LIMIT + _MARGIN),
        pytest.raises(ExecTimeout, match="not started"),
        guest.sandbox.exec_stream("true", timeout_sec=_LIMIT),
    ):
        pass


def test_a_stream_of_a_command_that_runs(guest: Guest) -> None:
    with within(_LIMIT + _STOP), pytest.raises(ExecTimeout, match="not known"):
        _stopped_in_the_middle(guest)


async def _stopped_in_the_middle_of(guest: Guest, sandbox: AsyncSandbox) -> None:
    async with sandbox.exec_stream("sleep", "60", timeout_sec=_LIMIT) as stream:
        guest.stop()
        await stream.wait()


async def test_streams_of_asyncio(guest: Guest, served: Served) -> None:
    async with AsyncClient(served.url, api_key=served.key) as client:
        sandbox = await client.sandboxes.get(guest.sandbox.id)
        async with asyncio.timeout(2 * _LIMIT + _STOP + _MARGIN):
            with pytest.raises(ExecTimeout, match="not known"):
                await _stopped_in_the_middle_of(guest, sandbox)
            with pytest.raises(ExecTimeout, match="not started"):
                async with sandbox.exec_stream("true", timeout_sec=_LIMIT):
                    pass
            with pytest.raises(AgentError, match="not responding"):
                await sandbox.exec("true", timeout_sec=_LIMIT)


@pytest.mark.parametrize(("options", "code"), [((), 124), (("--json",), 125)])
def test_the_command_line(
    guest: Guest, served: Served, options: tuple[str, ...], code: int
) -> None:
    """A stream is given up at the limit; with `--json` the server says first what is the matter."""
    guest.stop()
    arguments = ("sandbox", "exec", "--timeout", str(_LIMIT), *options, guest.sandbox.id, "true")
    with within(_LIMIT + _MARGIN), _wrenn(served, *arguments) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"respon" in said


def test_commands_without_a_time_limit(guest: Guest, served: Served, tmp_path: Path) -> None:
    """Each says within a minute what is the matter."""
    guest.stop()
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    id = guest.sandbox.id
    began = time.monotonic()
    running = [
        _wrenn(served, "sandbox", "exec", id, "true"),
        _wrenn(served, "cp", f"{id}:/etc/hostname", os.fspath(tmp_path / "back")),
        _wrenn(served, "cp", os.fspath(file), f"{id}:"),
    ]
    for process in running:
        with process:
            _, said = process.communicate(timeout=90)
        assert process.returncode in (1, 125)
        assert b"not responding" in said
    assert time.monotonic() - began < 60


def test_a_stream_that_ends_in_time_all_the_same(served: Served) -> None:
    """Of a guest that is well: a command is stopped, and one that ends is not."""
    with served.client() as client, client.sandboxes.create() as sandbox:
        for cmd in ("sleep", "yes"):
            with pytest.raises(ExecTimeout, match="was stopped"):
                _ran_out(sandbox, cmd)
        with sandbox.exec_stream("sh", "-c", "exit 3", timeout_sec=30) as stream:
            assert stream.wait() == 3


def test_readers_that_are_slower_than_the_command(served: Served) -> None:
    """What counts is when the command ended, not when its end was read."""
    with served.client() as client, client.sandboxes.create() as sandbox:
        with sandbox.exec_stream("sh", "-c", "echo x; exit 3", timeout_sec=_LIMIT) as stream:
            time.sleep(2 * _LIMIT)
            assert stream.wait() == 3
        for script, code in (("exit 3", 3), ("sleep 60", 124)):
            script = f"head -c 300000 /dev/zero; {script}"
            arguments = ("sandbox", "exec", "--timeout", "2", sandbox.id, "sh", "-c", script)
            with _wrenn(served, *arguments) as process:
                assert process.stdout is not None
                assert os.read(process.stdout.fileno(), 1) == b"\0"
                time.sleep(4)
                assert [e for e in sandbox.processes.list() if e.cmd == "sh"] == []
                output, _ = process.communicate(timeout=60)
            assert (process.returncode, len(output)) == (code, 299_999)


def test_input_that_nobody_takes(served: Served, tmp_path: Path) -> None:
    """The message that says stop waits behind the input: the connection is given up."""
    much = tmp_path / "much"
    with much.open("wb") as made:
        made.truncate(64 << 20)
    with served.client() as client, client.sandboxes.create() as sandbox:
        arguments = ("sandbox", "exec", "-i", "--timeout", "2", sandbox.id, "sleep", "60")
        with (
            much.open("rb") as file,
            within(2 + _STOP),
            _wrenn(served, *arguments, stdin=file.fileno()) as process,
        ):
            process.communicate(timeout=60)
        assert process.returncode == 124
        deadline = time.monotonic() + 60
        while any(each.cmd == "sleep" for each in sandbox.processes.list()):
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_server_that_is_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {**os.environ, "WRENN_URL": url, "WRENN_API_KEY": "wrn_" + "0" * 32}
        with within(_LIMIT + _MARGIN):
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "wrenn_sandbox",
                    "sandbox",
                    "exec",
                    "--timeout",
                    "1",
                    "sb-x",
                    "true",
                ],
                env=environment,
                capture_output=True,
                check=False,
                timeout=60,
            )
        assert done.returncode == 125
        assert b"in time" in done.stderr
        with (
            Client(url, api_key="k", timeout=1) as client,
            within(_MARGIN),
            pytest.raises(ConnectionFailed, match="in time"),
        ):
            client.usage()
