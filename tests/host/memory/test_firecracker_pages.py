"""A guest of a few instructions that Firecracker continues on memory of the page server.

Firecracker's own log comes the same way as what the guest says, and has neither of its signs.
"""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from support.proc import wait_until
from support.tiny_guest import BINARY, COUNTING, NEEDS, kernel_of
from wrenn_sandbox.host.memory.page_server import WORKING_SET, GuestMemory, PageServer
from wrenn_sandbox.host.paths import MachineFiles
from wrenn_sandbox.host.privileged.process import ProcessHandle, process_start_time
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.patience import patience

_SLOT = Slot(index=40_000, netns=None, host_ip="127.0.0.1", uid=760_123, tap=None, host_port=40_000)
_MEMORY_MB = 128

pytestmark = [pytest.mark.root, *NEEDS]


class Firecracker:
    """A process of it in a directory of its own, ended in the end; calls block."""

    def __init__(self, directory: Path, name: str) -> None:
        self._socket, self._console = directory / f"{name}.sock", directory / f"{name}.out"
        with self._console.open("wb") as console:
            self.process = subprocess.Popen(
                [BINARY, "--api-sock", str(self._socket), "--id", name],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        wait_until(self._socket.exists)

    @property
    def handle(self) -> ProcessHandle:
        """Of its process, to close."""
        pid = self.process.pid
        return ProcessHandle.adopt(pid, process_start_time(pid))

    def call(self, method: str, path: str, body: Mapping[str, object]) -> None:
        """A request that succeeds."""
        connection = http.client.HTTPConnection("localhost", timeout=patience(20))
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(patience(20))
        connection.sock.connect(str(self._socket))
        with contextlib.closing(connection):
            connection.request(method, path, json.dumps(body), {"Accept": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 204, (path, answer.read(), self._console.read_bytes())

    def load(self, snapshot: Path, pages: Path, *, resume: bool) -> None:
        """Continue a snapshot on memory of the page server there."""
        backend = {"backend_type": "Uffd", "backend_path": str(pages)}
        body = {"snapshot_path": str(snapshot), "mem_backend": backend, "resume_vm": resume}
        self.call("PUT", "/snapshot/load", body)

    def store(self, snapshot: Path, memory: Path) -> None:
        """Stop and store it."""
        self.call("PATCH", "/vm", {"state": "Paused"})
        body = {"snapshot_type": "Full", "snapshot_path": str(snapshot)}
        self.call("PUT", "/snapshot/create", body | {"mem_file_path": str(memory)})

    def rounds(self) -> int:
        """How many the guest has completed since this process began; none of them was wrong."""
        said = self._console.read_bytes()
        assert b"^" not in said, said
        return said.count(b"~")

    def run(self, rounds: int) -> None:
        """Wait until the guest has completed so many."""
        wait_until(lambda: self.rounds() >= rounds)

    def end(self) -> None:
        """Safe to repeat."""
        self.process.kill()
        self.process.wait()
        self._socket.unlink(missing_ok=True)


@pytest.fixture
async def stack() -> AsyncIterator[contextlib.AsyncExitStack]:
    async with contextlib.AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def snapshot(tmp_path: Path, stack: contextlib.AsyncExitStack) -> Path:
    """A directory with a stored guest: `vmstate` and `memory`."""
    first = await asyncio.to_thread(Firecracker, tmp_path, "first")
    stack.callback(first.end)
    await asyncio.to_thread(_boot, first, tmp_path)
    return tmp_path


def _boot(vmm: Firecracker, directory: Path) -> None:
    kernel = str(kernel_of(COUNTING, directory / "kernel"))
    vmm.call("PUT", "/boot-source", {"kernel_image_path": kernel, "boot_args": ""})
    vmm.call("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": _MEMORY_MB})
    vmm.call("PUT", "/actions", {"action_type": "InstanceStart"})
    vmm.run(3)
    vmm.store(directory / "vmstate", directory / "memory")
    vmm.end()


async def _restored(
    stack: contextlib.AsyncExitStack, snapshot: Path, name: str, *, resume: bool
) -> tuple[PageServer, Firecracker]:
    """The stored guest in a new Firecracker, on a page server."""
    directory = snapshot / name
    directory.mkdir()
    files = MachineFiles(directory)
    memory = GuestMemory(snapshot / "memory", working_set=snapshot / WORKING_SET)
    server = await PageServer.start(_SLOT, files, memory)
    stack.push_async_callback(server.close)
    vmm = await asyncio.to_thread(Firecracker, directory, name)
    stack.callback(vmm.end)
    with contextlib.closing(vmm.handle) as handle:
        server.serve(handle)
    state = snapshot / "vmstate"
    await asyncio.to_thread(vmm.load, state, files.pages_socket, resume=resume)
    await server.connected()
    return server, vmm


async def _end(server: PageServer) -> str:
    async with asyncio.timeout(patience(20)):
        return await server.wait()


async def test_firecracker_continues_a_guest_on_the_page_server(
    snapshot: Path, stack: contextlib.AsyncExitStack
) -> None:
    server, vmm = await _restored(stack, snapshot, "second", resume=True)
    await asyncio.to_thread(vmm.run, 4)
    await server.record(snapshot / WORKING_SET)
    vmm.end()
    assert await _end(server) == "the page server ended (0)"
    server, vmm = await _restored(stack, snapshot, "third", resume=True)
    await asyncio.to_thread(vmm.run, 4)


async def test_a_guest_of_firecracker_waits_once_its_page_server_is_gone(
    snapshot: Path, stack: contextlib.AsyncExitStack
) -> None:
    server, vmm = await _restored(stack, snapshot, "second", resume=False)
    os.kill(server.pid, signal.SIGKILL)
    assert await _end(server) == "the page server ended (-9)"
    await asyncio.to_thread(vmm.call, "PATCH", "/vm", {"state": "Resumed"})
    await asyncio.sleep(0.3)
    assert vmm.rounds() == 0
