"""Request bodies, with a length or in chunks, as a stream of pieces."""

from __future__ import annotations

from .connection import PIECE_SIZE, Connection
from .errors import Disconnected, InvalidArgument, PayloadTooLarge
from .http import Head

_LINE_LIMIT = 4096


class Body:
    """The body of one request; `finished` once its last byte has been taken."""

    def __init__(self, connection: Connection, head: Head) -> None:
        self._connection = connection
        self._chunked = head.chunked
        self._left = 0 if self._chunked else head.content_length
        """Bytes to come: of the current chunk, or of the whole body."""
        self._expects_continue = head.headers.get("expect", "").lower() == "100-continue"
        self.finished = not self._chunked and self._left == 0

    async def piece(self, limit: int = PIECE_SIZE) -> bytes:
        """The next bytes as they come, empty at the end; raises when the client goes away."""
        if self._left == 0 and not self.finished:
            await self._next_chunk()
        if self.finished:
            return b""
        size = min(self._left, limit)
        if self._connection.buffer:
            piece = bytes(self._connection.buffer[:size])
            del self._connection.buffer[:size]
        else:
            await self._continue()
            piece = await self._connection.take(size)
            if not piece:
                raise Disconnected
        self._left -= len(piece)
        if self._left == 0 and not self._chunked:
            self.finished = True
        return piece

    async def exactly(self, count: int) -> bytes | None:
        """The next `count` bytes, None when the body ends right here."""
        parts: list[bytes] = []
        missing = count
        while missing > 0:
            piece = await self.piece(missing)
            if not piece:
                if missing == count:
                    return None
                raise InvalidArgument("message is cut off")
            parts.append(piece)
            missing -= len(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def whole(self, limit: int) -> bytes:
        """All of the body; PayloadTooLarge when it has more than `limit` bytes."""
        if not self._chunked and self._left > limit:
            raise PayloadTooLarge(f"body is larger than {limit} bytes")
        parts: list[bytes] = []
        size = 0
        while True:
            piece = await self.piece()
            if not piece:
                return parts[0] if len(parts) == 1 else b"".join(parts)
            size += len(piece)
            if size > limit:
                raise PayloadTooLarge(f"body is larger than {limit} bytes")
            parts.append(piece)

    def skip_buffered(self) -> bool:
        """Skip a rest that has been received already; True when the body is finished then."""
        buffer = self._connection.buffer
        if not self.finished and not self._chunked and self._left <= len(buffer):
            del buffer[: self._left]
            self._left = 0
            self.finished = True
        elif not self.finished and self._chunked and self._left == 0:
            for end in (b"0\r\n\r\n", b"\r\n0\r\n\r\n"):
                if buffer.startswith(end):
                    del buffer[: len(end)]
                    self.finished = True
        return self.finished

    async def _continue(self) -> None:
        """Tell a client that waits for it to send the body."""
        if self._expects_continue:
            self._expects_continue = False
            await self._connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def _next_chunk(self) -> None:
        line = await self._line()
        if line == b"":  # the end of the previous chunk's data
            line = await self._line()
        size = line.partition(b";")[0].strip()
        if (
            not size
            or len(size) > 15
            or not all(byte in b"0123456789abcdefABCDEF" for byte in size)
        ):
            raise InvalidArgument("malformed chunk")
        self._left = int(size, 16)
        if self._left == 0:
            while await self._line():
                pass  # trailers carry nothing that is used here
            self.finished = True

    async def _line(self) -> bytes:
        buffer = self._connection.buffer
        while (end := buffer.find(b"\r\n")) < 0:
            if len(buffer) > _LINE_LIMIT:
                raise InvalidArgument("malformed chunk")
            await self._continue()
            if not await self._connection.receive():
                raise Disconnected
        line = bytes(buffer[:end])
        del buffer[: end + 2]
        return line
