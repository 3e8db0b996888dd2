"""What the guest agent learns of TCP sockets that are not its own, and how it ends them."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from support.network.pools import run
from wrenn_agent.sock_diag import can_end_connections, end_connections, is_listened_on

pytestmark = pytest.mark.root

_CLONE_NEWNET = 0x40000000


def _elsewhere(test: Callable[[], None]) -> None:
    """Run it in a network namespace of its own."""

    def act() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        run("ip", "link", "set", "lo", "up")
        test()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(act).result()


def _listener(address: str, family: int = socket.AF_INET) -> socket.socket:
    return socket.create_server(
        (address, 0), family=family, dualstack_ipv6=family == socket.AF_INET6
    )


def test_who_listens_on_an_address() -> None:
    def test() -> None:
        with _listener("0.0.0.0") as all_, _listener("127.0.0.1") as one:
            assert is_listened_on("127.0.0.2", all_.getsockname()[1])
            assert is_listened_on("127.0.0.1", one.getsockname()[1])
            assert not is_listened_on("127.0.0.2", one.getsockname()[1])
            assert not is_listened_on("127.0.0.1", 1)
        with _listener("::", socket.AF_INET6) as both:
            assert is_listened_on("127.0.0.1", both.getsockname()[1])

    _elsewhere(test)


def test_whether_connections_can_be_ended() -> None:
    _elsewhere(lambda: _expect(can_end_connections()))


def _expect(value: bool) -> None:
    assert value


def test_connections_with_an_address_are_broken_and_no_others() -> None:
    def test() -> None:
        with ExitStack() as stack:

            def connected(listener: socket.socket, source: str) -> socket.socket:
                address = ("127.0.0.1", listener.getsockname()[1])
                client = socket.create_connection(address, source_address=(source, 0))
                stack.enter_context(client)
                server = stack.enter_context(listener.accept()[0])
                server.settimeout(0.2)
                return server

            plain = stack.enter_context(_listener("0.0.0.0"))
            mapped = stack.enter_context(_listener("::", socket.AF_INET6))
            kept = stack.enter_context(_listener("0.0.0.0"))
            broken = [connected(each, "127.0.0.9") for each in (plain, mapped)]
            whole = [connected(kept, "127.0.0.9"), connected(plain, "127.0.0.8")]
            end_connections("127.0.0.9", kept.getsockname()[1])
            for each in broken:
                with pytest.raises(ConnectionError):
                    each.recv(1)
            for each in whole:
                with pytest.raises(TimeoutError):
                    each.recv(1)

    _elsewhere(test)
