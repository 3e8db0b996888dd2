"""A TLS connection that one thread reads while another writes."""

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from support.certificates import Pair, make_pair
from wrenn_sandbox.client.tls import SharedSocket, shared_context


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tls"))


class _Server:
    """The other end, in the hands of the test: nothing is sent that `tell` does not send."""

    def __init__(self, wire: socket.socket, pair: Pair) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.cert, pair.key)
        self._wire = wire
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    def shake_hands(self) -> bytes:
        """Until the client is sure; answers the session tickets, which are not sent yet."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self.tell(self._outgoing.read())
                self._incoming.write(self._wire.recv(65536))
            else:
                return self._outgoing.read()

    def hear(self) -> bytes:
        while True:
            try:
                return self._tls.read()
            except ssl.SSLWantReadError:
                self._incoming.write(self._wire.recv(65536))

    def sealed(self, data: bytes) -> bytes:
        self._tls.write(data)
        return self._outgoing.read()

    def tell(self, sealed: bytes) -> None:
        self._wire.sendall(sealed)


@pytest.fixture
def ends(pair: Pair) -> Iterator[tuple[SharedSocket, _Server, bytes]]:
    """A client, its server, and the tickets that the server has yet to send."""
    context = shared_context()
    context.load_verify_locations(pair.cert)
    here, there = socket.socketpair()
    with here, there, ThreadPoolExecutor() as threads:
        server = _Server(there, pair)
        tickets = threads.submit(server.shake_hands)
        with context.wrap_socket(here, server_hostname="127.0.0.1") as client:
            assert isinstance(client, SharedSocket)
            yield client, server, tickets.result()


Ends = tuple[SharedSocket, _Server, bytes]


def test_a_write_beside_half_of_a_session_ticket(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads in OpenSSL at once lose the connection, or end the process, in 1 of 300."""
    client, server, tickets = ends
    inside, most = 0, 0

    def watched(name: str) -> None:
        plain = getattr(ssl.SSLSocket, name)

        def act(self: ssl.SSLSocket, *args: object) -> object:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            try:
                return plain(self, *args)
            finally:
                inside -= 1

        monkeypatch.setattr(ssl.SSLSocket, name, act)

    for each in ("recv", "send"):
        watched(each)
    server.tell(tickets[:50])
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(client.recv, 100)
        time.sleep(0.2)  # until it waits for the other half
        client.sendall(b"question")
        assert server.hear() == b"question"
        server.tell(tickets[50:] + server.sealed(b"answer"))
        assert reading.result(5) == b"answer"
    assert most == 1


def test_much_both_ways_at_once(ends: Ends) -> None:
    client, server, tickets = ends
    server.tell(tickets)
    size = 3_000_000
    with ThreadPoolExecutor() as threads:
        telling = threads.submit(client.sendall, bytes(size))

        def reading() -> int:
            count = 0
            while count < size:
                count += len(client.recv(65536))
            return count

        read = threads.submit(reading)
        heard = 0
        while heard < size:
            data = server.hear()
            heard += len(data)
            server.tell(server.sealed(data))
        telling.result(5)
        assert read.result(5) == size


def test_the_time_limit_of_a_socket_is_kept(ends: Ends) -> None:
    client, server, tickets = ends
    server.tell(tickets[:50])
    client.settimeout(0.2)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        client.recv(100)
    assert 0.15 < time.monotonic() - began < 2
    assert client.gettimeout() == 0.2
    with pytest.raises(TimeoutError):
        client.sendall(bytes(10_000_000))


def test_an_end_by_another_thread_ends_a_read(ends: Ends) -> None:
    client, _, _ = ends
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(client.recv, 100)
        threading.Event().wait(0.1)
        client.shutdown(socket.SHUT_RDWR)
        assert reading.result(5) == b""


def test_a_close_by_another_thread_ends_a_read(ends: Ends) -> None:
    client, server, tickets = ends
    server.tell(tickets[:50])
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(client.recv, 100)
        time.sleep(0.1)
        client.close()
        with suppress(OSError):
            reading.result(5)
        assert reading.done()
