"""A plain TCP copy into a machine and out of it: what the way through the API is compared with."""

import contextlib
import hashlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from wrenn_sandbox.host.network.rules import SLOT_TABLE
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.slot import GUEST_IP, TAP_NAME

from .api import Api

_PORT = 5001
_PIECE = 64 * 1024
_PEER = f"""
import os, socket
server = socket.create_server(("", {_PORT}))
if os.fork():
    os._exit(0)
os.setsid()
while True:
    peer = server.accept()[0]
    if peer.recv(1) == b"w":
        with open("large", "wb", buffering=0) as file:
            while piece := peer.recv({_PIECE}):
                file.write(piece)
    else:
        with open("large", "rb") as file:
            peer.sendfile(file)
    peer.close()
"""
"""Listens before it goes to the background. Told `w` it receives `large`, else it sends it."""


class PlainCopy:
    """Copies of the guest's file `large`, both ways; each gives the seconds it took."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect

    def up(self, path: Path) -> float:
        """Send a file, until the guest has written all of it."""
        with self._connect() as peer, path.open("rb") as file:
            begin = time.monotonic()
            peer.sendall(b"w")
            peer.sendfile(file)
            peer.shutdown(socket.SHUT_WR)
            assert peer.recv(1) == b""
            return time.monotonic() - begin

    def down(self, digest: str) -> float:
        """Receive the file, whose SHA-256 has to be `digest`."""
        found = hashlib.sha256()
        with self._connect() as peer:
            begin = time.monotonic()
            peer.sendall(b"r")
            while piece := peer.recv(_PIECE):
                found.update(piece)
            seconds = time.monotonic() - begin
        assert found.hexdigest() == digest
        return seconds


@contextlib.contextmanager
def reachable(namespace: str, port: int) -> Iterator[Callable[[], socket.socket]]:
    """Gives connections to a port of the guest; this end's packets reach it as long as the block.

    The packet filter lets them reach the guest agent alone otherwise.
    """
    thread = NamespaceThread("plain-tcp")

    def connected() -> socket.socket:
        return socket.create_connection((GUEST_IP, port), timeout=120)

    chain = ("inet", SLOT_TABLE, "output")
    match = ("oifname", TAP_NAME, "tcp", "dport", str(port))
    try:
        added = _nft(namespace, "--echo", "--handle", "insert", "rule", *chain, *match, "accept")
        handle = added.split("# handle ")[1].split()[0]
        try:
            yield lambda: thread.run_sync(namespace, connected)
        finally:
            _nft(namespace, "delete", "rule", *chain, "handle", handle)
    finally:
        thread.close()


@contextlib.asynccontextmanager
async def plain_copy(api: Api, sandbox: str, namespace: str) -> AsyncIterator[PlainCopy]:
    """Run the other end in the guest."""
    await api.exec(sandbox, "sh", "-c", 'exec python3 -c "$0" >/dev/null 2>&1', _PEER)
    with reachable(namespace, _PORT) as connect:
        yield PlainCopy(connect)


def _nft(namespace: str, *arguments: str) -> str:
    argv = ["ip", "netns", "exec", namespace, "nft", *arguments]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout
