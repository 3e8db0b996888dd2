"""What systemd is told of a server: over a socket like its own, with the fake driver."""

import asyncio
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from wrenn_sandbox.cli import unit
from wrenn_sandbox.server.service import Service
from wrenn_sandbox.settings import ServiceSettings
from wrenn_sandbox.testing.server_process import ServerProcess

_SEC = 60.0


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """Receives what systemd would be told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(_SEC)
        receiver.bind(str(tmp_path / "notify"))
        yield receiver


def _next(systemd: socket.socket, *, without: str = "WATCHDOG=1") -> str:
    """The next thing told, but for something that is told often."""
    while (told := systemd.recv(100).decode()) == without:
        pass
    return told


@pytest.mark.slow
def test_systemd_learns_that_a_server_is_ready_alive_and_stopping(
    systemd: socket.socket, tmp_path: Path
) -> None:
    server = ServerProcess(
        tmp_path / "data",
        tmp_path / "log",
        {
            "WRENN_DRIVER": "fake",
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "200000",
        },
    )
    with server:
        assert _next(systemd) == "READY=1"
        assert httpx2.get(f"{server.url}/health").status_code == 200
        for _ in range(3):
            assert systemd.recv(100) == b"WATCHDOG=1"
        os.kill(server.pid, signal.SIGTERM)
        assert _next(systemd) == "STOPPING=1"
        assert server.stop() == 0


@pytest.mark.slow
def test_an_aborted_server_logs_where_it_was(tmp_path: Path) -> None:
    settings = {"WRENN_DRIVER": "fake", "WRENN_HOT_POOL_SIZE": "0"}
    server = ServerProcess(tmp_path / "data", tmp_path / "log", settings)
    with server:
        os.kill(server.pid, signal.SIGABRT)
        assert server.stop() == -signal.SIGABRT
    server.purge()
    assert "Fatal Python error: Aborted" in (log := server.log.read_text())
    # not where it began: SQLAlchemy runs in greenlets, whose frames are all that is shown then
    assert "(most recent call first)" in log


async def test_the_watchdog_of_another_process_is_left_alone(
    systemd: socket.socket, tmp_path: Path
) -> None:
    told = Service(
        ServiceSettings(
            notify_socket=str(tmp_path / "notify"), watchdog_usec=1000, watchdog_pid=os.getpid() + 1
        )
    )
    told.ready()
    await told.keep_alive()
    assert _next(systemd, without="") == "READY=1"


def test_abstract_addresses_of_systemd_are_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(_SEC)
        receiver.bind(f"\0wrenn-test-{os.getpid()}")
        Service(ServiceSettings(notify_socket=f"@wrenn-test-{os.getpid()}")).stopping()
        assert receiver.recv(100) == b"STOPPING=1"


def test_a_systemd_that_has_gone_is_no_trouble(tmp_path: Path) -> None:
    Service(ServiceSettings(notify_socket=str(tmp_path / "gone"))).ready()
    Service(ServiceSettings()).ready()


async def test_a_server_without_a_file_left_goes_on(systemd: socket.socket, tmp_path: Path) -> None:
    service = Service(ServiceSettings(notify_socket=str(tmp_path / "notify"), watchdog_usec=20_000))
    service.ready()
    assert _next(systemd) == "READY=1"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    watchdog = asyncio.create_task(service.keep_alive())
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        await asyncio.sleep(0.1)
        service.stopping()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not watchdog.done()
    watchdog.cancel()


def test_the_printed_unit_starts_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    unit.command()
    lines = capsys.readouterr().out.splitlines()
    [start] = [line for line in lines if line.startswith("ExecStart=")]
    assert start == f"ExecStart={sys.executable} -m wrenn_sandbox serve"
