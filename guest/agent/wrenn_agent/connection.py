"""One client connection: awaitable receive and send on a non-blocking socket."""

from __future__ import annotations

import _socket as socket
import os
import select

from .errors import Disconnected, RequestTimeout
from .loop import Loop, Task, suspend

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

RECEIVE_SIZE = 64 * 1024
PIECE_SIZE = 256 * 1024
SENDFILE_SIZE = 512 * 1024
PATIENCE = 60.0
"""Seconds that a client may stay silent in the middle of a request."""

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_HANGUP = select.EPOLLRDHUP
_BROKEN = select.EPOLLHUP | select.EPOLLERR


class Connection:
    """Bytes in and out for exactly one task, `owner`; `buffer` holds what is not consumed yet.

    While the owner is not receiving, a peer that goes away interrupts it with Disconnected.
    """

    def __init__(self, loop: Loop, sock: socket.socket, on_close: Callable[[Connection], None]):
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._on_close = on_close
        self._interest = _IN | _HANGUP
        self._receiving: Task | None = None
        self._sending: Task | None = None
        self._gone = False
        self.buffer = bytearray()
        self.owner: Task | None = None
        self.idle = True
        """Between two requests: may be closed without harm."""
        self.torn = False
        """A message was sent in part: nothing sensible can follow it."""
        self.closed = False
        loop.register(self._fd, self._interest, self._on_events)

    @property
    def address(self) -> tuple[str, int]:
        """Of this end."""
        host, port = self._sock.getsockname()[:2]
        return host, port

    @property
    def peer_address(self) -> str:
        """Of the other end, without its port."""
        host: str = self._sock.getpeername()[0]
        return host

    async def receive(self, patience: float | None = PATIENCE) -> bool:
        """Wait for bytes and append them to `buffer`; False at the end of the stream.

        Raises RequestTimeout after `patience` seconds (None: never), Disconnected on errors.
        """
        data = await self.take(RECEIVE_SIZE, patience)
        self.buffer += data
        return bool(data)

    async def take(self, limit: int, patience: float | None = PATIENCE) -> bytes:
        """As `receive`, but give at most `limit` bytes as they are, empty at the end."""
        task = self._loop.current
        timer = None
        if patience is not None:
            timer = self._loop.call_later(
                patience, lambda: task.interrupt(RequestTimeout("request took too long"))
            )
        try:
            while True:
                data = await self._receive_once(task, limit)
                if data is not None:
                    return data
        finally:
            if timer is not None:
                timer.cancel()

    def receive_now(self) -> None:
        """Append to `buffer` what has arrived already, without waiting."""
        try:
            self.buffer += self._sock.recv(RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            raise Disconnected from error

    async def send(self, data: bytes) -> None:
        """Send all of `data`, waiting for the peer where needed; raises Disconnected."""
        sent = self._send_some(data)
        if sent == len(data):
            return
        rest = memoryview(data)[sent:]
        self.torn = True
        while rest:
            await self._writable()
            rest = rest[self._send_some(rest) :]
        self.torn = False

    async def send_file(self, fd: int, offset: int, count: int) -> None:
        """Send `count` bytes of a file without copying; Disconnected when the file is shorter."""
        self.torn = True
        while count > 0:
            try:
                sent = os.sendfile(self._fd, fd, offset, min(count, SENDFILE_SIZE))
            except BlockingIOError:
                await self._writable()
                continue
            except OSError as error:
                raise Disconnected from error
            if sent == 0:
                raise Disconnected
            offset += sent
            count -= sent
            await self._loop.breathe()
        self.torn = False

    def release(self) -> socket.socket:
        """Leave the socket to the owner, who watches it from now on; it is still closed here."""
        self._loop.unregister(self._fd)
        return self._sock

    def drop(self) -> None:
        """End the connection from outside, whatever its owner is doing."""
        self._gone = True
        self.idle = False
        if self.owner is not None:
            self.owner.interrupt(Disconnected())

    def finish_sending(self) -> None:
        """Tell the peer that nothing follows, while still reading from it."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise Disconnected from error

    def close(self) -> None:
        """Close the socket; may be called twice."""
        if not self.closed:
            self.closed = True
            self._loop.unregister(self._fd)
            self._sock.close()
            self._on_close(self)

    async def _receive_once(self, task: Task, limit: int) -> bytes | None:
        if self._gone:
            raise Disconnected
        self._watch(_IN | _HANGUP)
        self._receiving = task
        try:
            await suspend()
        finally:
            self._receiving = None
        try:
            return self._sock.recv(limit)
        except BlockingIOError:
            return None
        except OSError as error:
            raise Disconnected from error

    def _send_some(self, data: bytes | memoryview) -> int:
        if self._gone:
            raise Disconnected
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Disconnected from error

    async def _writable(self) -> None:
        if self._gone:
            raise Disconnected
        self._watch(self._interest | _OUT)
        self._sending = self._loop.current
        try:
            await suspend()
        finally:
            self._sending = None
            if not self._gone:
                self._watch(self._interest & ~_OUT)

    def _watch(self, interest: int) -> None:
        if interest != self._interest:
            self._interest = interest
            self._loop.modify(self._fd, interest)

    def _on_events(self, events: int) -> None:
        if self._receiving is not None:
            self._receiving.wake()
            return
        if events & (_HANGUP | _BROKEN):
            self._loop.unregister(self._fd)
            self.drop()
            return
        if events & _OUT and self._sending is not None:
            self._sending.wake()
        if events & _IN:
            self._watch(self._interest & ~_IN)
