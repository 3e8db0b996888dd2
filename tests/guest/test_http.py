"""The agent's HTTP server against ordinary, malformed, slow and greedy clients."""

from __future__ import annotations

import json
import resource
import socket
import time
from contextlib import closing

import pytest

from support.agent_process import Agent, envelope, process_message
from support.proc import descriptors, wait_until

LIST = b"POST /process.Process/List HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def exchange(agent: Agent, *pieces: bytes) -> bytes:
    """Everything the agent answers until it closes the connection."""
    with closing(agent.socket()) as sock:
        for piece in pieces:
            sock.sendall(piece)
        return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    answer = b""
    while data := sock.recv(65536):
        answer += data
    return answer


def test_health_answers_without_a_token(agent: Agent) -> None:
    reply = agent.request("GET", "/health")
    assert (reply.status, reply.body) == (204, b"")
    assert "Content-Length" not in reply.headers


def test_metrics_tell_what_the_guest_uses(agent: Agent) -> None:
    metrics = agent.request("GET", "/metrics").json()
    sizes = {"mem_total", "mem_used", "mem_cache", "disk_used", "disk_total"}
    assert set(metrics) == sizes | {"ts", "cpu_count", "cpu_used_pct"}
    assert all(isinstance(metrics[name], int) for name in {*sizes, "ts", "cpu_count"})
    assert isinstance(metrics["cpu_used_pct"], float)
    assert 0 <= metrics["cpu_used_pct"] <= 100


def test_unknown_paths_and_methods(agent: Agent) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("POST", "/process.Process/Nothing", 404),
        ("POST", "/health", 405),
        ("GET", "/process.Process/List", 405),
    ):
        reply = agent.request(method, path)
        assert reply.status == status
        assert set(reply.json()) == {"code", "message"}


def test_wrong_media_types_are_refused(agent: Agent) -> None:
    for path in ("List", "Start"):
        reply = agent.request(
            "POST", f"/process.Process/{path}", b"x", {"Content-Type": "application/proto"}
        )
        assert reply.status == 415


@pytest.mark.parametrize("body", [b"{", b"[]", b"1", b'"x"', b"\xff", b"[" * 100_000])
def test_malformed_json_is_refused(agent: Agent, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    reply = agent.request("POST", "/process.Process/List", body, headers)
    assert (reply.status, reply.json()["code"]) == (400, "invalid_argument")


def test_connection_is_reused_and_requests_may_be_pipelined(agent: Agent) -> None:
    requests = [b"GET /health HTTP/1.1\r\n\r\n", LIST + b"Content-Length: 2\r\n\r\n{}"] * 3
    requests.append(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
    answer = exchange(agent, b"".join(requests))
    assert answer.count(b"HTTP/1.1 204 ") == 4
    assert answer.count(b'{"processes":[]}') == 3


def test_stream_leaves_the_connection_usable(agent: Agent) -> None:
    message = envelope(process_message("echo", "hi", stdin=False))
    start = (
        b"POST /process.Process/Start HTTP/1.1\r\nContent-Type: application/connect+json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(message), message)
    )
    answer = exchange(agent, start, start, b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answer.count(b'"exitCode":0') == 2
    assert answer.count(b"HTTP/1.1 204 ") == 1


def test_request_in_tiny_pieces(agent: Agent) -> None:
    request = (
        LIST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n1\r\n{\r\n1;a=b\r\n}\r\n"
    )
    pieces = [bytes([byte]) for byte in request + b"0\r\nTrailer: x\r\n\r\n"]
    assert exchange(agent, *pieces).endswith(b'{"processes":[]}')


def test_old_client_gets_a_stream_without_chunks(agent: Agent) -> None:
    message = envelope(process_message("echo", "hi", stdin=False))
    answer = exchange(
        agent,
        b"POST /process.Process/Start HTTP/1.0\r\nContent-Type: application/connect+json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(message), message),
    )
    assert b"Transfer-Encoding" not in answer
    assert answer.endswith(b"\x02\x00\x00\x00\x02{}")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/2.0\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nspace : x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\na: " + b"x" * 40_000, 431),
        (LIST + b"Content-Length: -1\r\n\r\n", 400),
        (LIST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400),
        (LIST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
        (LIST + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (LIST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        (LIST + b"Content-Length: 99999999999\r\n\r\n{}", 413),
    ],
)
def test_bad_requests_are_refused_and_the_connection_closed(
    agent: Agent, request_bytes: bytes, status: int
) -> None:
    with closing(agent.socket()) as sock:
        sock.sendall(request_bytes)
        sock.shutdown(socket.SHUT_WR)
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"code", "message"}


def test_limits_of_bodies(agent: Agent) -> None:
    headers = {"Content-Type": "application/json"}
    body = b'{"a":"' + b"x" * 5_000_000 + b'"}'
    assert agent.request("POST", "/process.Process/List", body, headers).status == 413
    chunked = LIST + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n" % (len(body), body)
    assert exchange(agent, chunked).startswith(b"HTTP/1.1 413 ")
    huge = b"\x00\xff\xff\xff\xff{}"
    answer = exchange(
        agent,
        b"POST /process.Process/Start HTTP/1.1\r\nContent-Type: application/connect+json\r\n"
        b"Connection: close\r\nContent-Length: 7\r\n\r\n" + huge,
    )
    assert b'"resource_exhausted"' in answer


@pytest.mark.parametrize(
    "message", [b"", b"\x00\x00", b"\x00\x00\x00\x00\x09{}", b"\x01\0\0\0\2{}"]
)
def test_broken_envelopes_are_refused(agent: Agent, message: bytes) -> None:
    answer = exchange(
        agent,
        b"POST /process.Process/Start HTTP/1.1\r\nContent-Type: application/connect+json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(message), message),
    )
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'{"error":{"code":"' in answer


def test_compressed_unary_message_is_refused(agent: Agent) -> None:
    reply = agent.call("process.Process/List", {}, {"Content-Encoding": "gzip"})
    assert (reply.status, reply.json()["code"]) == (501, "unimplemented")


def test_clients_that_hang_do_not_keep_others_out(agent: Agent) -> None:
    sockets = [agent.socket() for _ in range(900)]
    try:
        for sock in sockets[:300]:
            sock.sendall(b"GET /hea")
        assert agent.request("GET", "/health").status == 204
    finally:
        for sock in sockets:
            sock.close()
    wait_until(lambda: descriptors(agent.process.pid) < 60)


def test_running_out_of_descriptors(fresh_agent: Agent) -> None:
    agent = fresh_agent
    assert agent.run("true").exit_code == 0
    limit = descriptors(agent.process.pid) + 5
    resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    with closing(agent.connect()) as kept:
        kept.request("GET", "/health")
        kept.getresponse().read()
        sockets = [agent.socket() for _ in range(20)]
        assert agent.request("GET", "/health").status == 204, "idle connections make room"
        for sock in sockets:
            sock.close()
    result = agent.run("echo", "hi")
    assert result.stdout == b"hi\n" or (result.error or {})["code"] == "resource_exhausted"
    resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (limit - 4, limit))
    wait_until(lambda: (agent.run("true").error or {}).get("code") == "resource_exhausted")


def test_client_that_never_reads_is_dropped_when_it_goes(agent: Agent) -> None:
    before = descriptors(agent.process.pid)
    message = envelope(process_message("head", "-c", "50000000", "/dev/zero"))
    sock = agent.socket()
    sock.sendall(
        b"POST /process.Process/Start HTTP/1.1\r\nContent-Type: application/connect+json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(message), message)
    )
    assert sock.recv(10)
    assert agent.pids()
    sock.close()
    wait_until(lambda: not agent.pids() and descriptors(agent.process.pid) <= before)


def test_answers_are_quick(agent: Agent) -> None:
    with closing(agent.connect()) as connection:
        times = []
        for _ in range(200):
            started = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse().read()
            times.append(time.perf_counter() - started)
    assert sorted(times)[100] < 0.01, "no delayed acknowledgement or poll in between"
