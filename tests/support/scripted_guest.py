"""Both ends of a guest client's connections."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from wrenn_sandbox.host.guest import GuestClient
from wrenn_sandbox.patience import patience

HEALTHY = b"HTTP/1.1 204 No Content\r\n\r\n"


class Guest:
    """The guest's ends of the connections that its client has made, and what came in on them."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.ends: list[socket.socket] = []
        self.requests: list[bytes] = []
        self.client = GuestClient(self._connect, "token")

    async def _connect(self) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self._listener.getsockname())
        end, _ = self._listener.accept()
        end.setblocking(False)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ends.append(end)
        return sock

    async def asked(self) -> socket.socket:
        """Take a request; the connection that it came on."""
        while True:
            for end in self.ends:
                with suppress(OSError):
                    if request := end.recv(65536):
                        self.requests.append(request)
                        return end
            await asyncio.sleep(0)

    async def call(self, answer: bytes = HEALTHY) -> bytes:
        """Have the client ask something and answer it like this; the body that it gets."""
        calling = asyncio.create_task(self.client.call("GET", "/x"))
        (await self.asked()).sendall(answer)
        return (await calling)[1]

    def close(self) -> None:
        self.client.close()
        for end in self.ends:
            end.close()
        self._listener.close()


@asynccontextmanager
async def a_guest() -> AsyncIterator[Guest]:
    guest = Guest()
    try:
        async with asyncio.timeout(patience(20)):
            yield guest
    finally:
        guest.close()
        await asyncio.sleep(0)
