"""The process of the egress proxy: one for all sandboxes of a host, without any rights.

It gets sockets of the slots from the server and makes none of its own: its network is empty. Its
arguments are descriptors: of a socket, over which JSON goes in messages of their own, and of a file
with the certificates of the authorities that it trusts.

    to it     {"set": SLOT, "names": ..., ...}      with the listeners of a slot that it has not yet
              {"drop": SLOT}
              {"opened": NUMBER}                    with the socket, unless it cannot be had
    from it   {"open": NUMBER, "slot": SLOT, "kind": "tcp" or "udp"}
              {"denied": SLOT, "count": ..., "names": [...]}

It ends with the server.
"""

import asyncio
import itertools
import json
import socket
import ssl
import sys
from functools import partial
from typing import Final

from . import http, tls
from .sandbox import Sandbox

MESSAGE_LIMIT: Final = 256 * 1024
_TELL_SEC: Final = 1.0


class _Proxy:
    def __init__(self, control: socket.socket, far_context: ssl.SSLContext) -> None:
        self._control = control
        self._far_context = far_context
        self._sending = asyncio.Lock()
        self._sandboxes: dict[int, Sandbox] = {}
        self._numbers = itertools.count(1)
        self._wanted: dict[int, asyncio.Future[socket.socket]] = {}
        self._told: dict[int, int] = {}

    async def run(self) -> None:
        """Serve until the server is gone."""
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        loop.add_reader(self._control, self._hear, ended)
        while not ended.done():
            await asyncio.wait([ended], timeout=_TELL_SEC)
            for index, sandbox in list(self._sandboxes.items()):
                if sandbox.denials != self._told.get(index, 0):
                    self._told[index] = sandbox.denials
                    names = list(sandbox.last_denied)
                    await self._say(denied=index, count=sandbox.denials, names=names)
        ended.result()

    def _hear(self, ended: "asyncio.Future[None]") -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, MESSAGE_LIMIT, 2)
            if data:
                self._take(json.loads(data), [socket.socket(fileno=fd) for fd in fds])
                return
        except BlockingIOError:
            return
        except Exception as error:
            if not ended.done():
                ended.set_exception(error)
            return
        if not ended.done():
            ended.set_result(None)

    def _take(self, message: dict, sockets: list[socket.socket]) -> None:  # type: ignore[type-arg]
        for each in sockets:
            each.setblocking(False)
        if "opened" in message:
            wanted = self._wanted.pop(message["opened"], None)
            if wanted is None or wanted.done():
                for each in sockets:
                    each.close()
            elif sockets:
                wanted.set_result(sockets[0])
            else:
                wanted.set_exception(OSError("no socket"))
        elif "drop" in message:
            self._told.pop(message["drop"], None)
            self._sandboxes.pop(message["drop"]).close()
        else:
            index = message.pop("set")
            if sockets:
                listeners = dict(zip((http.PORT, tls.PORT), sockets, strict=True))
                opening = partial(self._open, index)
                self._sandboxes[index] = Sandbox(listeners, opening, self._far_context)
            self._sandboxes[index].change(**message)

    async def _open(self, index: int, kind: str) -> socket.socket:
        number = next(self._numbers)
        wanted: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        self._wanted[number] = wanted
        await self._say(open=number, slot=index, kind=kind)
        try:
            return await wanted
        except asyncio.CancelledError:
            if wanted.done() and not wanted.cancelled() and wanted.exception() is None:
                wanted.result().close()
            raise

    async def _say(self, **message: object) -> None:
        async with self._sending:
            data = json.dumps(message).encode()
            await asyncio.get_running_loop().sock_sendall(self._control, data)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    control.setblocking(False)
    with open(int(sys.argv[2]), encoding="ascii") as roots:
        far_context = tls.calling(roots.read())
    asyncio.run(_Proxy(control, far_context).run())
