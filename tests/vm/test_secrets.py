"""A secret is in the requests of a real sandbox, and nowhere in the sandbox itself."""

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import dns.message
import dns.rrset
import pytest

from support.certificates import Pair, make_pair
from support.vm.outside import Outside, outside
from support.vm.rig import NewRig

pytestmark = pytest.mark.vm

_SECRET = "sk-never-in-a-guest"
_OWN = "the-guests-own-value"
_NETWORK = {
    "internet": False,
    "secrets": [
        {"name": "api.example", "header": "Authorization", "value": "Bearer {{secret:key}}"}
    ],
}
_PYTHON = f"""
import urllib.request
headers = {{"Authorization": "{_OWN}"}}
request = urllib.request.Request("https://api.example/python", headers=headers)
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""
_CURL = "if command -v curl; then curl -sSf https://api.example/curl; fi"
_LOOK = """
import glob, os, sys
wanted = bytes.fromhex(sys.argv[1])[::-1]
paths = glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline")
for top in ("/etc", "/home", "/root", "/run", "/tmp", "/usr/local", "/var"):
    paths += [os.path.join(at, name) for at, _, names in os.walk(top) for name in names]
for path in paths:
    try:
        if os.path.isfile(path) and wanted in open(path, "rb").read():
            print(path)
    except OSError:
        pass
"""


@contextlib.contextmanager
def _served(around: Outside, pair: Pair) -> Iterator[list[str]]:
    """A resolver for `api.example`, and its server, which notes the heads of requests."""
    asked: list[str] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    resolver = around.udp(around.private[0], 53)
    listener = around.listener(around.servers[0], 443)

    def resolve() -> None:
        while True:
            data, asker = resolver.recvfrom(4096)
            if not data:  # it was shut down
                return
            query = dns.message.from_wire(data)
            reply = dns.message.make_response(query)
            name = query.question[0].name
            reply.answer.append(dns.rrset.from_text(name, 0, "IN", "A", around.servers[0]))
            resolver.sendto(reply.to_wire(), asker)

    def serve() -> None:
        while True:
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                near, _ = listener.accept()
                with context.wrap_socket(near, server_side=True) as peer:
                    asked.append(peer.recv(65_536).decode("latin-1"))
                    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    threads = [threading.Thread(target=_until_closed, args=(each,)) for each in (resolve, serve)]
    for sock in (resolver, listener):
        sock.settimeout(None)
    for thread in threads:
        thread.start()
    try:
        yield asked
    finally:
        for sock in (resolver, listener):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in threads:
            thread.join()


def _until_closed(work: Callable[[], None]) -> None:
    with contextlib.suppress(OSError, ValueError):
        work()


def _found_in_memory(pid: int, wanted: tuple[bytes, ...]) -> set[bytes]:
    """Which of these are in the memory of a process."""
    found: set[bytes] = set()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, end = (int(each, 16) for each in re.split("[- ]", line)[:2])
            tail = b""
            while start < end:
                try:
                    memory.seek(start)
                    piece = memory.read(min(4 << 20, end - start))
                except (OSError, OverflowError, ValueError):
                    break
                if not piece:
                    break
                found |= {each for each in wanted if each in tail + piece}
                start, tail = start + len(piece), piece[-100:]
    return found


def test_a_secret_is_in_requests_and_nowhere_in_the_guest(new_rig: NewRig, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, names="DNS:api.example")
    with outside() as around, _served(around, pair) as asked:
        rig, api = new_rig(WRENN_DNS_SERVERS=around.private[0], WRENN_EGRESS_CA_FILE=str(pair.cert))
        secret = {"name": "key", "value": _SECRET}
        assert api.request("POST", "/v1/secrets", secret).status_code == 201
        id = api.create(network=_NETWORK).id
        assert api.exec(id, "python3", "-c", _PYTHON, timeout_sec=120).stdout.strip() == "hello"
        api.output(id, _CURL)
        for head in asked:
            assert f"\r\nAuthorization: Bearer {_SECRET}\r\n" in head
            assert _OWN not in head
        wanted = (_SECRET.encode(), _OWN.encode())
        assert _found_in_memory(rig.machine_of(id), wanted) == {_OWN.encode()}
        reverse = _SECRET.encode()[::-1].hex()
        looked = api.exec(id, "python3", "-c", _LOOK, reverse, timeout_sec=120)
        assert (looked.exit_code, looked.stdout) == (0, "")

        api.pause(id)
        for path in (rig.data_dir / "paused" / id).rglob("*"):
            assert not path.is_file() or _SECRET.encode() not in path.read_bytes(), path
        api.resume(id)
        count = len(asked)
        assert api.exec(id, "python3", "-c", _PYTHON, timeout_sec=120).stdout.strip() == "hello"
        assert f"Bearer {_SECRET}" in asked[count]

        names = "env; ls /usr/local/share/ca-certificates; grep -c BEGIN /etc/ssl/certs/ca-c*"
        assert "wrenn-sandbox.crt" in api.output(id, names + " || true")
        assert api.request("PUT", f"/v1/sandboxes/{id}/network", {}).status_code == 200
        left = api.output(id, names + " || true")
        assert "wrenn-sandbox" not in left
        assert "SSL_CERT_FILE" not in left
