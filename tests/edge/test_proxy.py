"""Ports and the API behind Caddy, with the recipe of docs/ports.md and a certificate of our own."""

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx2
import pytest
import pytest_asyncio
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from support.api_server import make_settings
from support.certificates import make_pair
from support.ports import Edge, answering, program
from wrenn_sandbox.edge.address import host_of
from wrenn_sandbox.patience import patience

_UNPACKED: Final = Path(__file__).parents[2] / ".dev/caddy/usr/bin"
_CADDY: Final = shutil.which("caddy", path=_UNPACKED) or shutil.which("caddy")
_DOMAIN: Final = "sandboxes.test"
_OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(_CADDY is None, reason="a machine without Caddy"),
]


@dataclass(frozen=True)
class _Proxied:
    """A server behind a proxy on `port`, and a sandbox of it."""

    edge: Edge
    port: int
    trust: ssl.SSLContext
    sandbox: str

    def host(self, port: int) -> str:
        return host_of(port, self.sandbox, _DOMAIN)

    async def request(
        self,
        host: str,
        path: str = "/",
        headers: dict[str, str] | None = None,
        content: AsyncIterator[bytes] | None = None,
    ) -> httpx2.Response:
        """As if every name led to this machine."""
        async with httpx2.AsyncClient(
            verify=self.trust, trust_env=False, timeout=patience(20)
        ) as client:
            return await client.request(
                "GET" if content is None else "POST",
                f"https://127.0.0.1:{self.port}{path}",
                headers={"Host": f"{host}:{self.port}", **(headers or {})},
                content=content,
                extensions={"sni_hostname": host},
            )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxied(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[_Proxied]:
    directory = tmp_path_factory.mktemp("proxy")
    pair = make_pair(directory, names=f"DNS:api.test,DNS:*.{_DOMAIN}")
    settings = make_settings(directory / "data", None, domain=_DOMAIN, trusted_proxies="127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    async with Edge.serving(settings) as edge:
        configuration = f"""
            {{
                admin off
                auto_https off
            }}
            https://api.test:{port}, https://*.{_DOMAIN}:{port} {{
                bind 127.0.0.1
                tls {pair.cert} {pair.key}
                reverse_proxy 127.0.0.1:{edge.port} {{
                    flush_interval -1
                }}
            }}
        """
        with _caddy(directory, configuration) as process:
            trust = ssl.create_default_context(cafile=pair.cert)
            found = _Proxied(edge, port, trust, await edge.create())
            async with asyncio.timeout(patience(30)):
                while not await _listens(port):
                    assert process.poll() is None, (directory / "log").read_text()
            yield found


@contextmanager
def _caddy(directory: Path, configuration: str) -> Iterator["subprocess.Popen[bytes]"]:
    assert _CADDY is not None
    file = directory / "Caddyfile"
    file.write_text(configuration)
    argv = [_CADDY, "run", "--config", str(file), "--adapter", "caddyfile"]
    home = {**os.environ, "HOME": str(directory), "XDG_DATA_HOME": str(directory)}
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=home)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def _listens(port: int) -> bool:
    await asyncio.sleep(0.05)
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def test_the_api_and_ports_are_reached_through_a_proxy(proxied: _Proxied) -> None:
    heads: list[bytes] = []
    async with program(answering(_OK, heads)) as guest:
        path = f"/v1/sandboxes/{proxied.sandbox}/ports"
        ports = await proxied.request("api.test", path, {"X-API-Key": proxied.edge.team.key})
        url = ports.json()["url"].replace("{port}", str(guest.port))
        assert url == f"https://{proxied.host(guest.port)}:{proxied.port}"
        answer = await proxied.request(proxied.host(guest.port))
        assert (answer.status_code, answer.text) == (200, "hello")
        assert b"x-forwarded-proto: https\r\n" in heads[0]
        assert b"x-forwarded-for: 127.0.0.1\r\n" in heads[0]


async def test_the_guests_agent_answers_through_a_proxy(proxied: _Proxied) -> None:
    assert (await proxied.request(proxied.host(49983), "/health")).status_code == 204
    assert (await proxied.request(proxied.host(49983), "/metrics")).status_code == 401


async def test_a_websocket_goes_through_a_proxy(proxied: _Proxied) -> None:
    async def echo(peer: ServerConnection) -> None:
        async for message in peer:
            await peer.send(message)

    async with serve(echo, "127.0.0.1", 0) as server:
        host = proxied.host(server.sockets[0].getsockname()[1])
        async with connect(
            f"wss://{host}:{proxied.port}/",
            host="127.0.0.1",
            port=proxied.port,
            ssl=proxied.trust,
            server_hostname=host,
            proxy=None,
        ) as peer:
            for message in ("one", "two"):
                await peer.send(message)
                assert await peer.recv() == message


async def test_a_slow_upload_goes_through_a_proxy_as_it_comes(proxied: _Proxied) -> None:
    arrived = asyncio.Event()

    async def taking(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"first")
        arrived.set()
        await reader.readuntil(b"second")
        writer.write(_OK)

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await arrived.wait()
        yield b"second"

    async with program(taking) as guest:
        answer = await proxied.request(proxied.host(guest.port), content=body())
        assert (answer.status_code, answer.text) == (200, "hello")
