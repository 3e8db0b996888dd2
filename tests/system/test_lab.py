"""The lab without a host: what labs leave to each other, and hosts that hang."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.host import Host, LabError, _sweep
from lab.image import Image


def test_only_hosts_that_nobody_holds_are_removed(tmp_path: Path) -> None:
    held, left = tmp_path / "host-held", tmp_path / "host-left"
    for directory in (held, left):
        directory.mkdir()
        (directory / "disk").touch()
    lock = os.open(held, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [held]
    finally:
        os.close(lock)
    _sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


_REPLIES = (b'{"return": {}}', b'{"return": "RIP=1"}', b'{"return": "RIP=2"}')


class _PlayedMonitor(threading.Thread):
    """QEMU's control socket: greets, then answers each command with the next reply."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.commands: list[str] = []

    def run(self) -> None:
        peer, _ = self._listener.accept()
        with self._listener, peer, peer.makefile("rwb") as lines:
            lines.write(b'{"QMP": {}}\n')
            for reply in _REPLIES:
                lines.flush()
                self.commands.append(json.loads(lines.readline())["execute"])
                lines.write(reply + b"\n")


@pytest.fixture
def hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host whose process runs and answers nobody."""
    programs, directory = tmp_path / "bin", tmp_path / "run/host-one"
    programs.mkdir()
    directory.mkdir(parents=True)
    (programs / "ssh").write_text("#!/bin/sh\nexit 255\n")
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (directory / "console").write_text("last words")
    (directory / "qemu.log").touch()
    with subprocess.Popen(["sleep", "1000"]) as process:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        host = Host(Image(tmp_path / "image"), directory, process, 1, lock)
        yield host
        host.end()
        assert process.returncode == -signal.SIGKILL


def test_a_host_that_hangs_leaves_its_registers(hung: Host, tmp_path: Path) -> None:
    monitor = _PlayedMonitor(tmp_path / "run/host-one/qmp")
    monitor.start()
    with pytest.raises(LabError, match=r"ended or hung; see .*/lost;[\s\S]*last words"):
        hung.run("true")
    monitor.join()
    assert monitor.commands == ["qmp_capabilities", *["human-monitor-command"] * 2]
    assert (tmp_path / "run/lost/registers").read_text() == "RIP=1\nRIP=2"
    assert (tmp_path / "run/lost/console").read_text() == "last words"


def test_a_host_that_does_not_start_is_told_apart(hung: Host, tmp_path: Path) -> None:
    _PlayedMonitor(tmp_path / "run/host-one/qmp").start()
    with pytest.raises(LabError, match="did not start"):
        hung.wait(0.1)


def test_a_status_of_255_is_a_commands_own_where_the_host_answers(
    hung: Host, tmp_path: Path
) -> None:
    (tmp_path / "bin/ssh").write_text('#!/bin/sh\nfor word; do :; done\n[ "$word" = true ]\n')
    assert hung.run("exit 255") == 1
    (tmp_path / "bin/ssh").write_text('#!/bin/sh\nfor w; do :; done\n[ "$w" = true ] || exit 255\n')
    assert hung.run("exit 255") == 255
