"""A server for measurements, and its public API over one connection.

The HTTP client is the one for guests: a heavier one would be measured along with the server.
"""

import contextlib
import itertools
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Self

from wrenn_sandbox.host.guest.connection import Connection
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory
from wrenn_sandbox.testing.server_process import ServerProcess

_numbers = itertools.count(1)


@contextlib.contextmanager
def served(
    settings: Settings, overrides: Mapping[str, str], *, hot: int = 0
) -> Iterator[tuple[str, Paths]]:
    """URL and data directory of a server with `hot` VMs ready; it leaves nothing behind."""
    with working_directory(settings.data_dir, "bench") as data_dir:
        overrides = {"WRENN_HOT_POOL_SIZE": str(hot), **overrides}
        server = ServerProcess(data_dir, data_dir / "server.log", overrides)
        try:
            with server:
                yield server.url, Paths(data_dir)
        finally:
            server.purge()


class Api:
    """One team's connection to a server; one call at a time."""

    def __init__(self, url: str, credentials: Mapping[str, str]) -> None:
        self._url = url
        self.credentials = credentials
        self._connection: Connection | None = None

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect to the server and make an account with a key."""
        account = {"email": f"bench{next(_numbers)}@example.com", "password": "a long password"}
        with contextlib.closing(cls(url, {})) as nobody:
            answer = await nobody.call("POST", "/v1/auth/signup", account)
        with contextlib.closing(cls(url, {"Authorization": f"Bearer {answer['token']}"})) as user:
            answer = await user.call("POST", "/v1/api-keys", {"name": "bench"})
        return cls(url, {"X-API-Key": str(answer["key"])})

    def another(self) -> "Api":
        """The same team over a connection of its own."""
        return Api(self._url, self.credentials)

    async def call(
        self, method: str, path: str, fields: Mapping[str, object] | None = None
    ) -> dict[str, object]:
        """The JSON object of an answer that must be a success."""
        body = b"" if fields is None else json.dumps(fields).encode()
        if self._connection is None or not self._connection.reusable:
            self.close()
            self._connection = await _connect(self._url)
        headers = {"Content-Type": "application/json", **self.credentials}
        await self._connection.request(method, path, headers, body)
        content = await self._connection.body()
        assert self._connection.status < 300, content
        answer: dict[str, object] = json.loads(content or b"{}")
        return answer

    async def create(self) -> str:
        """The id of a new sandbox of the default template and size."""
        return str((await self.call("POST", "/v1/sandboxes", {}))["id"])

    async def exec(self, sandbox: str, cmd: str, *args: str) -> None:
        """Run a command that must succeed."""
        fields = {"cmd": cmd, "args": list(args)}
        answer = await self.call("POST", f"/v1/sandboxes/{sandbox}/exec", fields)
        assert answer["exit_code"] == 0, answer

    async def delete(self, sandbox: str) -> None:
        await self.call("DELETE", f"/v1/sandboxes/{sandbox}")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


async def _connect(url: str) -> Connection:
    host, port = url.removeprefix("http://").split(":")

    async def connect() -> socket.socket:
        sock = socket.create_connection((host, int(port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        return sock

    return await Connection.open(connect)
