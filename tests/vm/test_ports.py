"""Ports of a real guest, whose program listens on a loopback address only; a page in a browser."""

import http.client
import json
import socket
from collections.abc import Iterator, Mapping

import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from support.chromium import PROGRAM, browsing
from support.vm.rig import Api, Sandbox

pytestmark = pytest.mark.vm

_PROGRAM = r"""
import base64, hashlib, os, socket, threading, time
def text():
    return open("/root/text").read()
def reloading(peer):
    shown = text()
    while True:
        time.sleep(0.1)
        if text() != shown:
            shown = text()
            peer.sendall(b"\x81\x07changed")
listener = socket.create_server(("127.0.0.1", 3000))
if os.fork():
    os._exit(0)
os.setsid()
def serve(peer):
    head = b""
    while b"\r\n\r\n" not in head:
        head += peer.recv(4096)
    lines = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:-2])
    if lines.get("upgrade") != "websocket":
        body = head.split(b" ")[1]
        if body == b"/page":
            body = b'''<!doctype html><title>page</title><h1></h1><script>
                const show = async () => {
                    document.querySelector("h1").textContent = await (await fetch("text")).text();
                };
                const socket = new WebSocket(`ws://${location.host}/`);
                socket.onmessage = ({data}) => { if (data === "changed") show(); };
                socket.onopen = show;
                </script>'''
        elif body == b"/text":
            body = text().encode()
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        return peer.close()
    key = head.split(b"sec-websocket-key: ")[1].split(b"\r\n")[0]
    key = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    peer.sendall(b"HTTP/1.1 101 Go\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 b"Sec-WebSocket-Accept: " + base64.b64encode(key) + b"\r\n\r\n")
    peer.sendall(b"\x81\x05hello")
    threading.Thread(target=reloading, args=(peer,), daemon=True).start()
    while peer.recv(4096):
        pass
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""

_ONE_AT_A_TIME = r"""
import os, socket
listener = socket.create_server(("0.0.0.0", 3002))
if os.fork():
    os._exit(0)
os.setsid()
while True:
    peer, (address, _) = listener.accept()
    try:
        if b"upgrade:" in peer.recv(4096).lower():
            peer.sendall(b"HTTP/1.1 101 Go\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n")
            while data := peer.recv(4096):
                peer.sendall(data)
        else:
            peer.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + address.encode())
    except OSError:
        pass
    peer.close()
"""
"""Says who is connected, or echoes for as long as it is."""


@pytest.fixture(scope="module")
def listening(api: Api, sandbox: Sandbox) -> Sandbox:
    """The module's machine with a program on 127.0.0.1:3000, which outlives a pause."""
    _write(api, sandbox, "before")
    _start(api, sandbox, _PROGRAM)
    return sandbox


def _start(api: Api, sandbox: Sandbox, program: str) -> None:
    script = 'exec python3 -c "$0" >/dev/null 2>&1 </dev/null'
    assert api.exec(sandbox.id, "sh", "-c", script, program).exit_code == 0


def _write(api: Api, sandbox: Sandbox, text: str) -> None:
    """Change what the program's page shows."""
    script = 'printf %s "$0" >/root/text.new && mv /root/text.new /root/text'
    assert api.exec(sandbox.id, "sh", "-c", script, text).exit_code == 0


@pytest.fixture
def port(api: Api) -> int:
    return int(api.server.url.rpartition(":")[2])


def _get(port: int, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("GET", path, headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _host(sandbox: Sandbox, port: int) -> str:
    return f"3000-{sandbox.id}.localhost:{port}"


def _ways(api: Api, sandbox: Sandbox, port: int) -> Iterator[tuple[str, dict[str, str]]]:
    yield "/here", {"Host": _host(sandbox, port)}
    yield "/here", {"E2b-Sandbox-Id": sandbox.id, "E2b-Sandbox-Port": "3000"}
    key = {"X-API-Key": api.http.headers["X-API-Key"]}
    yield f"/v1/sandboxes/{sandbox.id}/ports/3000/here", key


def test_a_loopback_port_of_a_vm_is_reached_in_all_three_ways(
    api: Api, listening: Sandbox, port: int
) -> None:
    for path, headers in _ways(api, listening, port):
        assert _get(port, path, headers) == (200, b"/here")
    status, body = _get(port, "/", {"Host": f"3001-{listening.id}.localhost"})
    assert (status, "port is not open" in json.loads(body)["message"]) == (502, True)


def test_a_websocket_of_a_vm_ends_with_a_pause_and_comes_back_with_a_resume(
    api: Api, listening: Sandbox, port: int
) -> None:
    for _ in range(2):
        raw = socket.create_connection(("127.0.0.1", port), timeout=120)
        with connect(f"ws://{_host(listening, port)}/", sock=raw, proxy=None) as peer:
            assert peer.recv(timeout=120) == "hello"
            api.pause(listening.id)
            with pytest.raises(ConnectionClosedError):
                peer.recv(timeout=120)
        api.resume(listening.id)
        assert _get(port, "/again", {"Host": _host(listening, port)}) == (200, b"/again")


def test_a_port_open_to_all_is_reached_without_the_agent_and_a_fork_has_no_old_connection_to_it(
    api: Api, sandbox: Sandbox, port: int
) -> None:
    _start(api, sandbox, _ONE_AT_A_TIME)
    head = f"GET / HTTP/1.1\r\nHost: 3002-{sandbox.id}.localhost:{port}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=120) as peer:
        peer.sendall(f"{head}Connection: Upgrade\r\nUpgrade: echo\r\n\r\n".encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += peer.recv(4096)
        assert answer.startswith(b"HTTP/1.1 101 ")
        [made] = api.request("POST", f"/v1/sandboxes/{sandbox.id}/fork", {"count": 1}).json()
        fork = made["sandbox"]["id"]
        host = f"3002-{fork}.localhost:{port}"
        assert _get(port, "/", {"Host": host}) == (200, b"169.254.0.22")
        api.delete(fork)
        peer.sendall(b"x")
        assert peer.recv(1) == b"x"


@pytest.mark.skipif(PROGRAM is None, reason="a machine without Chromium")
def test_a_page_of_a_vm_changes_in_a_browser_by_a_message_over_its_websocket(
    api: Api, listening: Sandbox, port: int
) -> None:
    with browsing() as page:
        page.call("Page.enable")
        page.call("Page.navigate", url=f"http://{_host(listening, port)}/page")
        shown = 'document.querySelector("h1")?.textContent'
        page.until(f'{shown} === "before"')
        page.value("window.kept = true")
        _write(api, listening, "after")
        page.until(f'{shown} === "after"')
        assert page.value("window.kept")
