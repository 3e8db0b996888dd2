"""Firecracker's API: HTTP over a Unix socket, one connection for each call.

What answers may have been taken over by its guest: every answer is bounded in size and time, and
the process that listens must be the one that was started. Shapes: Firecracker's
src/firecracker/swagger/firecracker.yaml.
"""

import asyncio
import contextlib
import re
import socket
import struct
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.vmm.files import short_path
from wrenn_sandbox.patience import patience

Answer = TypeVar("Answer")
Method = Literal["GET", "PUT", "PATCH"]

ANSWER_SEC: Final = 120.0
"""For calls that write to disk or load a machine."""
SOON_SEC: Final = 20.0
"""For all others."""
HEAD_LIMIT: Final = 4096
BODY_LIMIT: Final = 64 * 1024
_STATUS: Final = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,6})[ \t]*\r\n", re.IGNORECASE)
_CREDENTIALS: Final = struct.Struct("=iII")
_NO_ANSWER: Final = "The VMM refused the command or has exited"
_SHOWN: Final = 500


class Declined(HostFailure):
    """Firecracker understood the call and says no; `detail` is its reason."""


class _Fault(msgspec.Struct):
    fault_message: str = ""


class _Instance(msgspec.Struct):
    state: str


class _Version(msgspec.Struct):
    firecracker_version: str


class Api:
    """Calls to one Firecracker.

    Each raises `Declined`, and `HostFailure` where it does not answer as it should.
    """

    def __init__(self, path: Path, pid: int) -> None:
        self._path = path
        self._pid = pid

    async def listens(self) -> bool:
        """Whether its socket takes connections by now; raises OSError for other reasons.

        There is a moment in which the socket is there and does not.
        """
        try:
            with short_path(self._path) as name:
                _, writer = await asyncio.open_unix_connection(name)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        await _closed(writer)
        return True

    async def version(self) -> str:
        """Its version, such as `1.14.4`."""
        return _decoded(await self.call("GET", "/version"), _Version).firecracker_version

    async def state(self) -> str:
        """`Not started`, `Running` or `Paused`."""
        return _decoded(await self.call("GET", "/"), _Instance).state

    async def pause(self) -> None:
        """Stop the guest's processors."""
        await self.call("PATCH", "/vm", {"state": "Paused"})

    async def resume(self) -> None:
        """Let a guest that was stopped run on; no effect on one that runs."""
        state = await self.state()
        if state == "Paused":
            await self.call("PATCH", "/vm", {"state": "Resumed"})
        elif state != "Running":
            raise HostFailure(_NO_ANSWER, detail=f"state {state!r}"[:_SHOWN])

    async def call(
        self, method: Method, target: str, body: object = None, seconds: float = SOON_SEC
    ) -> bytes:
        """The body of the answer to one call."""
        data = b"" if body is None else msgspec.json.encode(body)
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        if data:
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        try:
            async with asyncio.timeout(patience(seconds)):
                status, answer = await self._exchange(f"{head}\r\n".encode() + data)
        except TimeoutError as error:
            late = f"{method} {target}: no answer within {patience(seconds):g} s"
            raise HostFailure(_NO_ANSWER, detail=late) from error
        except (OSError, EOFError, ValueError) as error:
            raise HostFailure(_NO_ANSWER, detail=f"{method} {target}: {error}"[:_SHOWN]) from error
        if status not in (200, 204):
            raise Declined(_NO_ANSWER, detail=f"{method} {target}: {status} {_reason(answer)}")
        return answer

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        """Status and body; raises OSError, EOFError, and ValueError for what is no such answer."""
        with short_path(self._path) as name:
            reader, writer = await asyncio.open_unix_connection(name, limit=HEAD_LIMIT)
        try:
            _require_peer(writer, self._pid)
            writer.write(request)
            await writer.drain()
            head = await _head(reader)
            status, length = _STATUS.match(head), _LENGTH.search(head)
            if status is None:
                raise ValueError(f"no status line in {head[:_SHOWN]!r}")
            size = 0 if length is None else int(length[1])
            if size > BODY_LIMIT:
                raise ValueError(f"an answer of {size} bytes")
            return int(status[1]), await reader.readexactly(size)
        finally:
            await _closed(writer)


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _head(reader: asyncio.StreamReader) -> bytes:
    """The status line and all headers; raises EOFError and ValueError."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError as error:
        raise ValueError("headers without end") from error


def _require_peer(writer: asyncio.StreamWriter, pid: int) -> None:
    """Raise OSError unless the socket is that of the process: its path might lead elsewhere."""
    connection: socket.socket = writer.get_extra_info("socket")
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    found, _, _ = _CREDENTIALS.unpack(raw)
    if found != pid:
        raise OSError(f"process {found} listens there instead of {pid}")


def _reason(answer: bytes) -> str:
    try:
        return msgspec.json.decode(answer, type=_Fault).fault_message[:_SHOWN]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return repr(answer[:_SHOWN])


def _decoded(answer: bytes, kind: type[Answer]) -> Answer:
    try:
        return msgspec.json.decode(answer, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HostFailure(_NO_ANSWER, detail=str(error)[:_SHOWN]) from error
