"""`GET /tunnel?port=N`: a connection to a port of this guest, as the rest of this one.

So the host reaches what listens on the loopback addresses only. After the answer 101 all bytes are
those of the port, both ways, and each end of a direction is passed on. A caller that can do without
the agent says `Direct: yes`; where the port is open to it, the answer is 204.
"""

from __future__ import annotations

import _socket as socket
import errno
import fcntl
import os
import select
import struct
from contextlib import suppress
from functools import partial

from . import sock_diag
from .errors import (
    DeadlineExceeded,
    Disconnected,
    FailedPrecondition,
    InvalidArgument,
    from_os_error,
)
from .exchange import Exchange
from .loop import Loop, Timer, suspend

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .connection import Connection

PROTOCOL = "wrenn-tunnel"
_PIECE = 64 * 1024
_LARGE = 16 * 1024
"""What comes in pieces of so many bytes is not copied from then on."""

_PIPE = 1024 * 1024
"""Bytes that are moved at once without being copied, at most."""

_NAP_SECONDS = 0.002
"""How long what is large may gather: to be woken for each bit of it costs more than moving it."""

_SET_PIPE_SIZE = 1031

_TURNS = 4
"""Pieces that one direction may move before everything else has its turn."""

_CONNECT_SECONDS = 5.0
_LOOPBACK = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_ABORT = struct.pack("ii", 1, 0)
"""For SO_LINGER: closing resets the connection."""

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT


class Tunnels:
    """The route."""

    def __init__(self, loop: Loop, *, vm: bool) -> None:
        """Nobody does without the agent unless all of this machine is its own, `vm`."""
        self._loop = loop
        self._vm = vm
        self._direct: tuple[str, int] | None = None
        """Who has been told to connect without the agent in this life, and the agent's port."""

    async def open(self, exchange: Exchange) -> None:
        """Connect to a port and pass bytes on until both directions have ended.

        FailedPrecondition where nothing listens there.
        """
        if exchange.headers.get("upgrade") != PROTOCOL:
            raise InvalidArgument(f"send Upgrade: {PROTOCOL}")
        port = _port(exchange.head.query.get("port", ""))
        if exchange.headers.get("direct") == "yes" and self._is_open(exchange.connection, port):
            connection = exchange.connection
            self._direct = connection.peer_address, connection.address[1]
            await exchange.reply(204)
            return
        target = await self._connect(port)
        try:
            await exchange.switch(PROTOCOL)
            relay = _Relay(self._loop, exchange.connection, target)
            await relay.run()
        finally:
            target.close()

    def end_direct(self) -> None:
        """Break what has been connected without the agent, in a life before this one."""
        if self._direct is not None:
            with suppress(OSError):
                sock_diag.end_connections(*self._direct)
            self._direct = None

    def _is_open(self, connection: Connection, port: int) -> bool:
        """Whether the caller would get through to the port, and it can be ended."""
        with suppress(OSError):
            if self._vm and sock_diag.is_listened_on(connection.address[0], port):
                return sock_diag.can_end_connections()
        return False

    async def _connect(self, port: int) -> socket.socket:
        for family, address in _LOOPBACK:
            try:
                target = socket.socket(family, socket.SOCK_STREAM)
                target.setblocking(False)
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT:
                    continue
                raise from_os_error(error, "tunnel") from error
            done = False
            try:
                error_number = target.connect_ex((address, port))
                if error_number == errno.EINPROGRESS:
                    error_number = await self._connected(target)
                done = error_number == 0
            finally:
                if not done:
                    target.close()
            if done:
                return target
        raise FailedPrecondition(f"nothing listens on port {port}")

    async def _connected(self, target: socket.socket) -> int:
        """The outcome of a connection that is being made, as an errno."""
        task = self._loop.current
        late = DeadlineExceeded("the port does not accept connections")
        timer = self._loop.call_later(_CONNECT_SECONDS, lambda: task.interrupt(late))
        self._loop.register(target.fileno(), _OUT, lambda _events: task.wake())
        try:
            while not _is_writable(target):
                await suspend()
        finally:
            timer.cancel()
            self._loop.unregister(target.fileno())
        return target.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


class _Flow:
    """One direction; nothing more is read while something is left to be written.

    What comes in large pieces goes through a pipe from then on: the kernel moves it, copying
    nothing, which an emulated CPU does slowly.

    A target that `may_refuse` and takes nothing more breaks nothing: what comes is dropped. A
    program may answer and close before it has read all of a request.
    """

    def __init__(
        self,
        source: socket.socket,
        target: socket.socket,
        held: bytes = b"",
        *,
        may_refuse: bool = False,
    ) -> None:
        self.source = source
        self.target = target
        self._may_refuse = may_refuse
        self._refused = False
        self._held = memoryview(held)
        self._piped = 0
        self._pipe: tuple[int, int] | None = None
        self.ended = False
        self.nap: Timer | None = None
        """Set while nothing is read because more shall gather."""

    @property
    def holds(self) -> bool:
        """Whether something is left to be written."""
        return self._piped > 0 or bool(self._held)

    @property
    def is_large(self) -> bool:
        return self._pipe is not None

    def pass_on(self) -> bool:
        """Move what little has come; False where that is not all there is to do."""
        if self.ended or self._pipe is not None or self._held:
            return False
        data = self.source.recv(_PIECE)
        size = len(data)
        if not size:
            self._end()
            return False
        if self._refused:
            return True
        if size >= _LARGE:
            self._open_pipe()
        self._held = memoryview(data)
        try:
            self._give()
        except BlockingIOError:
            return False
        return not self._held and size < _LARGE

    def move(self) -> None:
        """Move what can be moved now; OSError where either side is broken."""
        moved = 0
        try:
            for _ in range(_TURNS):
                if self.holds:
                    self._give()
                elif self.ended:
                    return
                elif self._pipe is None:
                    if not self.pass_on():
                        return
                else:
                    size = _splice(self.source.fileno(), self._pipe[1], _PIPE)
                    if not size:
                        self._end()
                        return
                    moved += size
                    self._piped = size
        except BlockingIOError:
            if not self.holds and moved < _LARGE:
                self.close()  # it has become little

    def close(self) -> None:
        """Let go of the pipe and what is in it."""
        for fd in self._pipe or ():
            os.close(fd)
        self._pipe = None

    def _open_pipe(self) -> None:
        try:
            self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.fcntl(self._pipe[1], _SET_PIPE_SIZE, _PIPE)
        except OSError:
            return  # then it is copied, or in smaller pieces

    def _end(self) -> None:
        self.ended = True
        try:
            self.target.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._refuse(error)

    def _give(self) -> None:
        try:
            if self._pipe is not None and self._piped:
                self._piped -= _splice(self._pipe[0], self.target.fileno(), self._piped)
            else:
                self._held = self._held[self.target.send(self._held) :]
        except BlockingIOError:
            raise
        except OSError as error:
            self._refuse(error)

    def _refuse(self, error: OSError) -> None:
        """Note that the target takes nothing any more; raises the error where it may not refuse."""
        if not self._may_refuse:
            raise error
        self._refused = True
        self._piped = 0
        self._held = memoryview(b"")
        self.close()


class _Relay:
    """Bytes between a client's connection and a port, on events of both sockets."""

    def __init__(self, loop: Loop, connection: Connection, target: socket.socket) -> None:
        self._loop = loop
        self._client = connection.release()
        self._target = target
        self._up = _Flow(self._client, target, bytes(connection.buffer), may_refuse=True)
        self._down = _Flow(target, self._client)
        self._watched: dict[int, int] = {}
        self._broken = self._waits = False

    async def run(self) -> None:
        """Return when both directions have ended; Disconnected where one breaks."""
        self._owner = self._loop.current
        try:
            self._move(self._up, self._down)
            while not self._is_over():
                self._waits = True
                await suspend()
        except BaseException:
            self._broken = True
            raise
        finally:
            for fd, events in self._watched.items():
                if events:
                    self._loop.unregister(fd)
            for flow in (self._up, self._down):
                flow.close()
                if flow.nap is not None:
                    flow.nap.cancel()
            if self._broken:  # what was cut short must not look as if it had ended
                for each in (self._client, self._target):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        if self._broken:
            raise Disconnected

    def _is_over(self) -> bool:
        return self._broken or (self._up.ended and self._down.ended)

    def _move(self, *flows: _Flow) -> None:
        try:
            for flow in flows:
                flow.move()
        except OSError:
            self._broken = True
        self._look()

    def _look(self) -> None:
        """See to it that what can happen next is noticed."""
        if self._is_over():
            if self._waits:
                self._owner.wake()
            return
        for flow in (self._up, self._down):
            if flow.is_large and flow.nap is None and not (flow.holds or flow.ended):
                flow.nap = self._loop.call_later(_NAP_SECONDS, partial(self._wake, flow))
        self._watch(self._client, self._up, self._down)
        self._watch(self._target, self._down, self._up)

    def _wake(self, flow: _Flow) -> None:
        flow.nap = None
        self._move(flow)

    def _watch(self, sock: socket.socket, out_of: _Flow, into: _Flow) -> None:
        """A socket of which nothing is wanted is not watched: its end would be told for ever."""
        wanted = 0 if out_of.holds or out_of.ended or out_of.nap is not None else _IN
        if into.holds:
            wanted |= _OUT
        fd = sock.fileno()
        before = self._watched.get(fd, 0)
        if wanted == before:
            return
        self._watched[fd] = wanted
        if not wanted:
            self._loop.unregister(fd)
        elif not before:
            self._loop.register(fd, wanted, partial(self._on_events, out_of, into))
        else:
            self._loop.modify(fd, wanted)

    def _on_events(self, out_of: _Flow, into: _Flow, events: int) -> None:
        if events != _IN:
            self._move(out_of, into)
            return
        try:
            if out_of.pass_on():
                return
        except BlockingIOError:
            return
        except OSError:
            self._broken = True
        self._look()


def _splice(source: int, target: int, size: int) -> int:
    return os.splice(source, target, size, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65536):
        raise InvalidArgument("port must be a number from 1 to 65535")
    return int(text)


def _is_writable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLOUT)
    return bool(poll.poll(0))
