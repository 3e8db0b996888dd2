"""TLS by certificate: what is accepted at the start, over the wire, and when it is renewed."""

import asyncio
import contextlib
import os
import shutil
import signal
import ssl
import subprocess
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
import uvloop
from starlette.types import Receive, Scope, Send

from support.api_server import eventually
from support.certificates import Pair, make_pair
from support.listening import edge
from wrenn_sandbox.client import Client, ConnectionFailed
from wrenn_sandbox.client.tls import SharedSocket
from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.server.http_protocol import HttpProtocol
from wrenn_sandbox.server.http_server import HttpServer
from wrenn_sandbox.server.tls import Certificate
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.server_process import ServerProcess

pytestmark = pytest.mark.slow

_REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    answer = scope["scheme"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": answer + b" done"})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tls"), "other", "rsa:2048")


def _settings(**others: object) -> Settings:
    return Settings.model_validate({"shutdown_grace_sec": 1, **others})


def _certificate(pair: Pair) -> Certificate:
    certificate = Certificate.of(_settings(tls_cert=pair.cert, tls_key=pair.key))
    assert certificate is not None
    return certificate


def test_without_settings_there_is_none() -> None:
    assert Certificate.of(_settings()) is None


def _expired(directory: Path, pair: Pair) -> Pair:
    """One with the same key that expired yesterday, or never was valid."""
    made = Pair(directory / "expired.pem", pair.key)
    request = ("openssl", "req", "-new", "-key", str(pair.key), "-subj", "/CN=expired")
    signed = ("openssl", "x509", "-req", "-signkey", str(pair.key), "-days", "-1")
    asked = subprocess.run(request, check=True, capture_output=True).stdout
    files = ("-out", str(made.cert))
    subprocess.run([*signed, *files], input=asked, check=True, capture_output=True)
    return made


def test_when_a_certificate_expires_is_known(tmp_path: Path, pair: Pair, other: Pair) -> None:
    for each in (pair, other, _expired(tmp_path, pair)):
        command = ("openssl", "x509", "-in", str(each.cert), "-noout", "-enddate")
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        at = ssl.cert_time_to_seconds(said.strip().removeprefix("notAfter="))
        assert _certificate(each).expires == at


def test_certificates_that_cannot_be_used_are_refused(
    tmp_path: Path, pair: Pair, other: Pair
) -> None:
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("nonsense")
    missing = tmp_path / "missing"
    twin = make_pair(tmp_path, "twin")
    locked = tmp_path / "locked"
    locked.write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMA==\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    for cert, key, words in (
        (pair.cert, None, ["WRENN_TLS_KEY", "not set"]),
        (None, pair.key, ["WRENN_TLS_CERT", "not set"]),
        (missing, pair.key, ["WRENN_TLS_CERT", str(missing), "No such file"]),
        (pair.cert, missing, ["WRENN_TLS_KEY", str(missing), "No such file"]),
        (tmp_path, pair.key, ["WRENN_TLS_CERT", "directory"]),
        (pair.cert, other.key, ["WRENN_TLS_KEY", "not the key of"]),
        (other.cert, pair.key, ["WRENN_TLS_KEY", "not the key of"]),
        (pair.cert, twin.key, ["WRENN_TLS_KEY", "not the key of"]),
        (nonsense, pair.key, ["WRENN_TLS_CERT", str(nonsense)]),
        (pair.cert, nonsense, ["WRENN_TLS_KEY", str(nonsense)]),
        (pair.cert, locked, ["WRENN_TLS_KEY", str(locked)]),
    ):
        with pytest.raises(InvalidRequest) as caught:
            Certificate.of(_settings(tls_cert=cert, tls_key=key))
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)


def test_a_key_with_a_password_asks_nobody(tmp_path: Path, pair: Pair) -> None:
    locked = tmp_path / "locked.key"
    command = ("openssl", "pkey", "-aes256", "-passout", "pass:secret")
    files = ("-in", str(pair.key), "-out", str(locked))
    subprocess.run([*command, *files], check=True, capture_output=True)
    with pytest.raises(InvalidRequest, match="has a password"):
        Certificate.of(_settings(tls_cert=pair.cert, tls_key=locked))


def test_a_key_that_others_may_read(tmp_path: Path, pair: Pair) -> None:
    key = tmp_path / "key"
    shutil.copy(pair.key, key)
    for mode, count in ((0o644, 1), (0o640, 0), (0o600, 0)):
        key.chmod(mode)
        with structlog.testing.capture_logs() as lines:
            Certificate.of(_settings(tls_cert=pair.cert, tls_key=key))
        assert len(lines) == count, oct(mode)


async def test_a_key_that_vanishes_while_it_is_read_ends_nothing(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    shutil.copy(pair.key, key)
    certificate = _certificate(Pair(pair.cert, key))
    old, contents = certificate.context, certificate._contents

    def vanishing() -> list[bytes]:
        seen = contents()
        key.unlink()
        return seen

    monkeypatch.setattr(certificate, "_contents", vanishing)
    watching = asyncio.create_task(certificate.watch())
    certificate.renew()
    await eventually(lambda: certificate.reads == 1)
    watching.cancel()
    assert certificate.context is old


def _trusting(*pairs: Pair) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for pair in pairs:
        context.load_verify_locations(pair.cert)
    return context


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def _connected(server: HttpServer, context: ssl.SSLContext | None) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _ask(streams: Streams) -> bytes:
    reader, writer = streams
    writer.write(_REQUEST)
    return await reader.readuntil(b"done\r\n0\r\n\r\n")


def _name(streams: Streams) -> object:
    """The common name of the certificate that the server has shown."""
    shown = streams[1].get_extra_info("peercert")
    return dict(pair for (pair,) in shown["subject"])["commonName"]


async def test_requests_over_tls(pair: Pair) -> None:
    async with edge(_app, _settings(), _certificate(pair)) as server:
        assert server.url == f"https://127.0.0.1:{server.port}"
        async with _connected(server, _trusting(pair)) as streams:
            for _ in range(3):
                assert b"https done" in await _ask(streams)
            tls = streams[1].get_extra_info("ssl_object")
            assert tls.version() == "TLSv1.3"
        old = _trusting(pair)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        async with _connected(server, old) as streams:
            assert b"https done" in await _ask(streams)
        with pytest.raises(ssl.SSLCertVerificationError):
            async with _connected(server, ssl.create_default_context()):
                pass
        await eventually(lambda: server.connections.count == 0)


async def test_old_versions_of_tls_are_refused(pair: Pair) -> None:
    context = _trusting(pair)
    with warnings.catch_warnings(action="ignore"):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    async with edge(_app, _settings(), _certificate(pair)) as server:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with _connected(server, context):
                pass
        await eventually(lambda: server.connections.count == 0)


async def test_plain_http_on_the_tls_port_is_ended(pair: Pair) -> None:
    """Neither other protocols nor silence hold a place for longer than a handshake may take."""
    async with edge(_app, _settings(head_timeout_sec=0.3), _certificate(pair)) as server:
        for data in (_REQUEST, b"", b"\x16\x03\x01"):
            async with _connected(server, None) as (reader, writer):
                writer.write(data)
                with contextlib.suppress(ConnectionError):
                    assert b"HTTP" not in await reader.read()
        await eventually(lambda: server.connections.count == 0)


async def test_too_many_connections_over_tls(pair: Pair) -> None:
    async with (
        edge(_app, _settings(max_connections=1), _certificate(pair)) as server,
        _connected(server, _trusting(pair)) as streams,
    ):
        await _ask(streams)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with _connected(server, _trusting(pair)):
                pass
        await _ask(streams)


def test_a_connection_that_has_lost_its_socket_is_looked_at(pair: Pair) -> None:
    """On the loop that servers run on it is told of its end a moment later."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for size, more in ((16 << 20, True), (1 << 20, False)):
            await send({"type": "http.response.body", "body": bytes(size), "more_body": more})

    async def play() -> None:
        async with (
            edge(app, _settings(), _certificate(pair)) as server,
            _connected(server, _trusting(pair)) as (_, writer),
        ):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(_REQUEST)
            connections = server.server_state.connections
            await eventually(
                lambda: any(each.transport.get_write_buffer_size() for each in connections)
            )
            [connection] = connections
            assert isinstance(connection, HttpProtocol)
            connection.transport.abort()
            await asyncio.sleep(0)
            assert connection in connections
            assert connection.transport.get_extra_info("socket") is None
            assert connection._on_its_way() == 0

    uvloop.run(play())


async def test_a_new_certificate(tmp_path: Path, pair: Pair, other: Pair) -> None:
    """Also one with another kind of key. Open connections go on."""
    used = Pair(tmp_path / "cert", tmp_path / "key")
    shutil.copy(pair.cert, used.cert)
    shutil.copy(pair.key, used.key)
    certificate = _certificate(used)
    context = _trusting(pair, other)
    async with (
        edge(_app, _settings(), certificate) as server,
        _connected(server, context) as early,
    ):
        assert _name(early) == "server"
        await _ask(early)

        async def renew() -> None:
            before = certificate.reads
            certificate.renew()
            await eventually(lambda: certificate.reads > before)

        shutil.copy(other.cert, used.cert)
        with structlog.testing.capture_logs() as lines:
            await renew()
        assert [line["log_level"] for line in lines] == ["error"]
        async with _connected(server, context) as late:
            assert _name(late) == "server"
        shutil.copy(other.key, used.key)
        await renew()
        async with _connected(server, context) as late:
            assert _name(late) == "other"
            await _ask(late)
        await _ask(early)


def test_a_server_with_a_certificate(
    tmp_path: Path, pair: Pair, other: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the client: requests, a file, a WebSocket; a renewal; no way without trust."""
    used = Pair(tmp_path / "cert", tmp_path / "key")
    shutil.copy(pair.cert, used.cert)
    shutil.copy(pair.key, used.key)
    settings = {
        "WRENN_DRIVER": "fake",
        "WRENN_HOT_POOL_SIZE": "0",
        "WRENN_TLS_CERT": str(used.cert),
        "WRENN_TLS_KEY": str(used.key),
    }
    server = ServerProcess(tmp_path / "data", tmp_path / "log", settings)
    try:
        with server:
            assert server.url.startswith("https://127.0.0.1:")
            with Client(server.url) as client, pytest.raises(ConnectionFailed):
                client.signup("tls@example.com", "correct horse")
            monkeypatch.setenv("SSL_CERT_FILE", str(pair.cert))
            with Client(server.url) as client:
                client.signup("tls@example.com", "correct horse")
                sandbox = client.sandboxes.create()
                content = os.urandom(3_000_000)
                sandbox.files.write("edge-file", content)
                assert sandbox.files.read("edge-file") == content
                with sandbox.exec_stream("sh", "-c", "exit 7") as stream:
                    assert isinstance(stream._connection.socket, SharedSocket)
                    assert stream.wait() == 7
                shutil.copy(other.cert, used.cert)
                shutil.copy(other.key, used.key)
                os.kill(server.pid, signal.SIGHUP)
                sandbox.delete()
            monkeypatch.setenv("SSL_CERT_FILE", str(other.cert))
            with Client(server.url) as client:
                client.login("tls@example.com", "correct horse")
    finally:
        server.purge()
