"""`wrenn serve` on the fake driver, for tests of what calls a server over a real socket."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wrenn_sandbox.client import Client
from wrenn_sandbox.testing.server_process import ServerProcess

PASSWORD = "correct horse"
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Served:
    """A server and a team of it."""

    server: ServerProcess
    email: str
    token: str
    key: str

    @property
    def url(self) -> str:
        return self.server.url

    def client(self) -> Client:
        return Client(self.url, api_key=self.key)


@contextmanager
def serving(directory: Path, **more: str) -> Iterator[Served]:
    """Runs with these settings until the end of the block, and its machines with it."""
    settings = {
        "WRENN_DRIVER": "fake",
        "WRENN_HOT_POOL_SIZE": "0",
        "WRENN_AUTH_ATTEMPTS": "1000/minute",
        "WRENN_AUTH_ATTEMPTS_PER_ADDRESS": "1000/minute",
        "WRENN_SHUTDOWN_GRACE_SEC": "1",
        **more,
    }
    server = ServerProcess(directory / "data", directory / "server.log", settings)
    try:
        with server:
            yield _with_team(server)
    finally:
        server.purge()


def _with_team(server: ServerProcess) -> Served:
    email = f"user{next(_numbers)}@example.com"
    with Client(server.url) as client:
        token = client.signup(email, PASSWORD).token
        key = client.api_keys.create("tests").key
    assert key is not None
    return Served(server, email, token, key)
