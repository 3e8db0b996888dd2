"""Ports of the guest behind the agent's own: what listens on loopback addresses only."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import pytest

from support.agent_process import PATIENCE, Agent
from support.proc import descriptors, wait_until


def _ask(agent: Agent, port: int | str, extra: bytes = b"") -> tuple[socket.socket, bytes]:
    sock = agent.socket()
    head = f"GET /tunnel?port={port} HTTP/1.1\r\nHost: a\r\nUpgrade: wrenn-tunnel\r\n"
    sock.sendall(head.encode() + b"Connection: Upgrade\r\n\r\n" + extra)
    answer = b""
    while b"\r\n\r\n" not in answer:
        data = sock.recv(1)
        if not data:
            break
        answer += data
    return sock, answer


@contextmanager
def _listener(host: str = "127.0.0.1") -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        listener.settimeout(PATIENCE)
        yield listener


@contextmanager
def _tunnel(agent: Agent, host: str = "127.0.0.1") -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a tunnel."""
    with _listener(host) as listener:
        here, answer = _ask(agent, listener.getsockname()[1])
        assert answer.startswith(b"HTTP/1.1 101 ")
        there, _ = listener.accept()
        there.settimeout(PATIENCE)
        with here, there:
            yield here, there


def _all_of(sock: socket.socket) -> bytes:
    content = b""
    while data := sock.recv(1 << 20):
        content += data
    return content


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_tunnel_carries_bytes_both_ways_and_the_end_of_each(agent: Agent, host: str) -> None:
    with _tunnel(agent, host) as (here, there):
        here.sendall(b"question")
        assert there.recv(100) == b"question"
        here.shutdown(socket.SHUT_WR)
        assert there.recv(100) == b""
        there.sendall(b"answer")
        assert here.recv(100) == b"answer"
        there.close()
        assert here.recv(100) == b""


def test_what_comes_with_the_request_for_a_tunnel_reaches_the_port(agent: Agent) -> None:
    with _listener() as listener:
        here, _ = _ask(agent, listener.getsockname()[1], b"early")
        there, _ = listener.accept()
        with here, there:
            assert there.recv(100) == b"early"


def test_large_transfers_go_through_a_tunnel_whole_in_both_directions(agent: Agent) -> None:
    content = bytes(range(256)) * (64 * 1024)
    with _tunnel(agent) as (here, there):
        ends = [here, there]
        received: list[bytes] = [b"", b""]

        def send(end: socket.socket) -> None:
            end.sendall(content)
            end.shutdown(socket.SHUT_WR)

        def receive(number: int) -> None:
            received[number] = _all_of(ends[number])

        threads = [threading.Thread(target=send, args=(end,)) for end in ends]
        threads += [threading.Thread(target=receive, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert received == [content, content]


def test_a_reader_who_is_behind_stops_the_writer_and_not_the_agent(agent: Agent) -> None:
    with _tunnel(agent) as (here, there):
        there.settimeout(0.5)
        sent = 0
        with suppress(TimeoutError):
            while sent < 64 << 20:
                sent += there.send(b"x" * 65536)
        assert sent < 64 << 20
        assert agent.request("GET", "/health").status == 204
        there.close()
        assert len(_all_of(here)) == sent


def test_a_port_on_which_nothing_listens_is_no_tunnel(agent: Agent) -> None:
    with _listener() as listener:
        port = listener.getsockname()[1]
    sock, answer = _ask(agent, port)
    with closing(sock):
        assert answer.startswith(b"HTTP/1.1 412 ")


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "", "8080x", "٣"])
def test_a_tunnel_needs_the_number_of_a_port(agent: Agent, port: str) -> None:
    assert agent.request("GET", "/tunnel?port=1").status == 400, "without the upgrade"
    sock, answer = _ask(agent, port)
    with closing(sock):
        assert answer.startswith(b"HTTP/1.1 400 ")


def test_a_connection_that_breaks_is_broken_at_the_other_end_too(agent: Agent) -> None:
    for first in (0, 1):
        with _tunnel(agent) as ends:
            linger = b"\1\0\0\0\0\0\0\0"
            ends[first].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            ends[first].close()
            with pytest.raises(ConnectionResetError):
                ends[1 - first].recv(1)


def test_a_tunnel_needs_the_token_and_ends_with_a_life(fresh_agent: Agent) -> None:
    first = json.dumps({"accessToken": "secret", "generation": "one"}).encode()
    assert fresh_agent.request("POST", "/init", first).status == 204
    with _listener() as listener:
        sock, answer = _ask(fresh_agent, listener.getsockname()[1])
        sock.close()
        assert answer.startswith(b"HTTP/1.1 401 ")
        port = listener.getsockname()[1]
        sock = fresh_agent.socket()
        head = f"GET /tunnel?port={port} HTTP/1.1\r\nHost: a\r\nUpgrade: wrenn-tunnel\r\n"
        sock.sendall(f"{head}X-Access-Token: secret\r\n\r\n".encode())
        there, _ = listener.accept()
        with sock, there:
            there.settimeout(PATIENCE)
            assert sock.recv(4096).startswith(b"HTTP/1.1 101 ")
            token = {"X-Access-Token": "secret"}
            fresh_agent.request("POST", "/init", b'{"generation": "two"}', headers=token)
            with pytest.raises(ConnectionResetError):
                there.recv(1)


def test_small_messages_pass_behind_large_ones_and_between_them(agent: Agent) -> None:
    with _tunnel(agent) as (here, there):
        for size in (1, 300_000, 10, 1, 2_000_000, 1, 50_000, 1):
            for source, target in ((here, there), (there, here)):
                sending = threading.Thread(target=source.sendall, args=(b"y" * size,))
                sending.start()
                left = size
                while left:
                    left -= len(target.recv(min(left, 65536)))
                sending.join()


@pytest.mark.parametrize("size", [1, 200_000])
def test_tunnels_leave_no_descriptors_behind(agent: Agent, size: int) -> None:
    pid = agent.process.pid
    agent.request("GET", "/health")
    before = descriptors(pid)
    for _ in range(20):
        with _tunnel(agent) as (here, there):
            here.sendall(b"x" * size)
            there.recv(1)
    wait_until(lambda: descriptors(pid) <= before)
