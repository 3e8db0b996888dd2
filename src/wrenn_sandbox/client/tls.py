"""TLS under WebSockets that one thread reads while others write."""

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class SharedSocket(ssl.SSLSocket):
    """A TLS connection for several threads at once: only one of them at a time is in OpenSSL.

    OpenSSL asks for that, and Python 3.11 leaves it to its callers. Otherwise a write that meets
    the server's session ticket, which comes right after the handshake, loses the connection or
    ends the process. Nobody waits for the network during its turn.
    """

    _turn: threading.Lock

    def __new__(cls, *args: Any, **kwargs: Any) -> "SharedSocket":
        made = super().__new__(cls, *args, **kwargs)
        made._turn = threading.Lock()
        return made

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        return self._in_turn(lambda: super(SharedSocket, self).recv(buflen, flags))

    def send(self, data: Any, flags: int = 0) -> int:
        return self._in_turn(lambda: super(SharedSocket, self).send(data, flags))

    def close(self) -> None:
        """Close it; who waits for the network wakes up."""
        with suppress(OSError):
            socket.socket.shutdown(self, socket.SHUT_RDWR)
        super().close()

    def _in_turn(self, act: Callable[[], _Result]) -> _Result:
        began = time.monotonic()
        while True:
            with self._turn:
                limit = self.gettimeout()
                self.settimeout(0)
                try:
                    return act()
                except ssl.SSLWantReadError:
                    event = select.POLLIN
                except ssl.SSLWantWriteError:
                    event = select.POLLOUT
                finally:
                    self.settimeout(limit)
            left = None if limit is None else max(0.0, began + limit - time.monotonic())
            poll = select.poll()
            poll.register(self, event)
            if not poll.poll(None if left is None else left * 1000):
                raise TimeoutError("timed out")


def shared_context() -> ssl.SSLContext:
    """Python's default context, whose connections threads may share."""
    context = ssl.create_default_context()
    context.sslsocket_class = SharedSocket
    return context
