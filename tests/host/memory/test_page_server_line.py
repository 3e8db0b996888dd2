"""What the server makes of what a page server says, which its VMM may have taken over."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from wrenn_sandbox.host.memory import fault_handler
from wrenn_sandbox.host.memory.page_server import PageServer
from wrenn_sandbox.host.paths import MachineFiles
from wrenn_sandbox.host.privileged.process import ProcessHandle, process_start_time
from wrenn_sandbox.patience import patience


class Line:
    """A page server that this process plays, and the server's view of it."""

    def __init__(self, directory: Path) -> None:
        ours, self.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        pid = os.getpid()
        handle = ProcessHandle.adopt(pid, process_start_time(pid))
        self.server = PageServer(handle, MachineFiles(directory), ours)


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    line = Line(tmp_path)
    yield line
    line.server.detach()
    line.end.close()


async def test_a_page_server_that_says_much_does_not_keep_the_server_to_itself(line: Line) -> None:
    for number in range(20):
        line.end.send(fault_handler.FAILED + str(number).encode())
    line.server._hear()
    assert line.server._last_word == "3"
    async with asyncio.timeout(patience(20)):
        while line.server._last_word != "19":  # noqa: ASYNC110
            await asyncio.sleep(0)
