"""What the server makes of what a page server says, which its VMM may have taken over."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from wrenn_sandbox.host.memory import fault_handler
from wrenn_sandbox.host.memory.page_server import PageServer
from wrenn_sandbox.host.memory.pages import PAGE, Mapping
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


@pytest.mark.parametrize(
    "regions",
    [
        b"",
        b"0 4 65536 4 8",
        b"0 4 65536",
        b"0 9 65536",
        b"0 4 65536 5 8 131072",
        b"0 4 65536 4 9 131072",
        b"0 4 65536 4 8 131073",
        b"0 4 65536 4 8 18446744073709547520",
        b"0 9999999999999999999 65536",
    ],
)
async def test_regions_that_are_not_the_guests_memory_are_refused(
    line: Line, regions: bytes
) -> None:
    line.end.send(fault_handler.SERVING + regions)
    line.server._hear()
    with pytest.raises(LookupError):
        line.server.mappings(os.getpid(), 8 * PAGE)


async def test_regions_that_are_the_guests_memory_are_taken_in_order(line: Line) -> None:
    line.end.send(fault_handler.SERVING + b"4 8 65536 0 4 131072")
    line.server._hear()
    assert line.server.mappings(1, 8 * PAGE) == [
        Mapping(1, 131072, 131072 + 4 * PAGE, 0),
        Mapping(1, 65536, 65536 + 4 * PAGE, 4),
    ]
