"""What root in a real sandbox reaches: nothing that is closed, and what its policy opens."""

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.vm.outside import Ear, Outside, outside, sent_within
from support.vm.rig import Api, Rig, Sandbox
from wrenn_sandbox.host.network.addressing import data_dir_tag, netns_prefix, veth_prefix
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.patience import patience

pytestmark = [pytest.mark.vm, pytest.mark.serial]  # it attacks every address of this machine

_ATTACK = (Path(__file__).parents[1] / "support" / "vm" / "attack.py").read_text()
_PORT = 7007
_STREAM = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))
while True:
    peer.sendall(b"x")
    time.sleep(0.01)
"""
_CONNECT = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3]))
"""
_ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 80), timeout=60) as peer:
    peer.sendall(b"GET / HTTP/1.1\\r\\nHost: %s\\r\\n\\r\\n" % sys.argv[2].encode())
    print(peer.recv(1000).decode())
"""
_KINDS = {0x0800, 0x0806}
_NEVER = (
    "169.254.169.254",
    "169.254.0.20",
    "224.0.0.251",
    "255.255.255.255",
    "240.0.0.1",
    "0.0.0.0",
    "127.0.0.1",
)


@pytest.fixture(scope="module")
def around() -> Iterator[Outside]:
    with outside() as found:
        yield found


@dataclass(frozen=True)
class Guest:
    """A sandbox, and where it is on this host."""

    api: Api
    rig: Rig
    sandbox: Sandbox

    @property
    def slot(self) -> Slot:
        [slot] = [each.slot for each in self.rig.journals() if each.sandbox_id == self.sandbox.id]
        return slot

    @property
    def tag(self) -> str:
        return data_dir_tag(self.rig.data_dir)

    @property
    def veth(self) -> str:
        return f"{veth_prefix(self.tag)}{self.slot.index}"

    def other_slot(self) -> str:
        """The namespace of a slot that is not this sandbox's."""
        names = {each.name for each in Path("/run/netns").glob(f"{netns_prefix(self.tag)}*")}
        return min(names - {str(self.slot.netns)})

    def python(self, script: str, *arguments: object) -> str:
        words = map(str, arguments)
        done = self.api.exec(self.sandbox.id, "python3", "-c", script, *words, timeout_sec=120)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    def reaches(self, address: str, port: int, seconds: float) -> bool:
        words = ("-c", _CONNECT, address, str(port), str(seconds))
        return self.api.exec(self.sandbox.id, "python3", *words).exit_code == 0

    def allow(self, **policy: object) -> None:
        answer = self.api.request("PUT", f"/v1/sandboxes/{self.sandbox.id}/network", policy)
        assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def guest(api: Api, rig: Rig, sandbox: Sandbox) -> Guest:
    return Guest(api, rig, sandbox)


def _addresses(netns: str | None = None) -> list[str]:
    """The IPv4 addresses of a namespace, or of this one."""
    inside = ["-n", netns] if netns else []
    argv = ["ip", *inside, "-json", "-4", "address", "show"]
    found = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    return [str(each["local"]) for link in found for each in link["addr_info"]]


def _attack(guest: Guest, around: Outside) -> None:
    """Everything that a hostile root may send, and ears wherever it might arrive."""
    slot, other = guest.slot, guest.other_slot()
    open_server = around.servers[0]
    own = [each for each in _addresses() if not each.startswith(("127.", "10.231."))]
    near = [each for each in _addresses() if each.startswith("10.231.")][:8]
    there = [each for each in _addresses(other) if each != "169.254.0.22"]
    targets = [*around.private, *own, *there, *near, slot.host_ip, "169.254.0.22", *_NEVER]
    forged = ["169.254.0.22", "169.254.0.20", slot.host_ip, *there, open_server, "8.8.8.8"]
    order = {"targets": targets, "forged": forged, "open": open_server, "port": _PORT, "end": "END"}
    with contextlib.ExitStack() as stack:
        ears = {
            "the host's end": Ear(guest.veth),
            "another slot": around.namespaces.run_sync(other, lambda: Ear(None)),
            "outside": around.ear(),
        }
        for ear in ears.values():
            stack.callback(ear.close)
        server = stack.enter_context(around.udp(open_server, _PORT))
        on_host = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        on_host.bind(("0.0.0.0", _PORT))
        tcp_on_host = stack.enter_context(socket.create_server(("0.0.0.0", _PORT)))
        for each in (on_host, tcp_on_host):
            each.setblocking(False)
        answers = json.loads(guest.python(_ATTACK, json.dumps(order)))
        assert server.recv(100) == b"END"
        with pytest.raises(BlockingIOError):
            on_host.recv(100)
        with pytest.raises(BlockingIOError):
            tcp_on_host.accept()
        heard = {name: ear.heard() for name, ear in ears.items()}
    assert answers == []
    for name, packets in heard.items():
        if name != "outside":  # there this host's own kernel speaks IPv6 too
            assert {each.kind for each in packets} <= _KINDS, name
        forgeries = [each for each in packets if b"WRENN-FORGED" in each.frame]
        assert forgeries == [], name
    assert [each for each in heard["outside"] if b"WRENN-ATTACK" in each.frame] == []
    left = [each for each in heard["the host's end"] if each.source]
    assert {each.source for each in left} == {slot.host_ip}
    # what goes to addresses that look public leaves the slot; the host does not take it
    assert {each.target for each in left} <= {open_server, *own}
    assert [each for each in heard["another slot"] if each.source] == []
    ended = [each for each in heard["outside"] if each.source]
    assert {each.target for each in ended} == {open_server}
    assert b"END" in ended[-1].frame


def test_nothing_that_is_closed_is_reached(guest: Guest, around: Outside) -> None:
    _attack(guest, around)
    with around.listener(around.servers[0], 80):
        assert guest.reaches(around.servers[0], 80, 10)


def test_a_policy_opens_and_closes_a_running_sandbox(guest: Guest, around: Outside) -> None:
    one, other = around.servers
    with around.listener(one, 80), around.listener(other, 80):
        guest.allow(internet=False, allow=[one])
        assert not guest.reaches(other, 80, 0.5)
        assert guest.reaches(one, 80, 10)
        guest.allow(deny=[f"{one}/32"])
        assert not guest.reaches(one, 80, 0.5)
        assert guest.reaches(other, 80, 10)
        guest.allow()
        assert guest.reaches(one, 80, 10)


def test_a_name_is_no_way_to_an_address(guest: Guest, around: Outside) -> None:
    """The proxy answers in place of the server, whatever the guest says of it."""
    address = around.servers[0]
    with around.listener(address, 80) as listener:
        guest.allow(internet=False, allow=["allowed.invalid", "*.allowed.invalid"])
        for host, status in (
            (address, "403"),
            ("other.invalid", "403"),
            ("allowed.invalid", "502"),
        ):
            assert guest.python(_ASK, address, host).split()[1] == status
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()
    metrics = guest.api.request("GET", f"/v1/sandboxes/{guest.sandbox.id}/metrics").json()
    assert metrics["egress_denied_names"] == [address, "other.invalid"]
    guest.allow()


def test_an_open_connection_is_cut_within_a_second(guest: Guest, around: Outside) -> None:
    address = around.servers[0]
    with around.listener(address, 8000) as listener:
        words = {"cmd": "python3", "args": ["-c", _STREAM, address, "8000"], "background": True}
        path = f"/v1/sandboxes/{guest.sandbox.id}"
        started = guest.api.request("POST", f"{path}/exec", words).json()
        peer, _ = listener.accept()
        with peer:
            assert sent_within(peer, patience(1))
            began = time.monotonic()
            guest.allow(internet=False)
            assert time.monotonic() - began < patience(1)
            sent_within(peer, max(0.2, began + 1 - time.monotonic()))
            assert sent_within(peer, 1) == b""
            guest.allow()
            peer.settimeout(patience(20))
            assert peer.recv(1) == b"x"
        guest.api.request("DELETE", f"{path}/processes/{started['pid']}")


def test_all_of_it_holds_after_a_pause(guest: Guest, around: Outside) -> None:
    one, other = around.servers
    guest.allow(internet=False, allow=[one])
    guest.api.pause(guest.sandbox.id)
    guest.api.resume(guest.sandbox.id)
    with around.listener(one, 80), around.listener(other, 80):
        assert not guest.reaches(other, 80, 0.5)
        assert guest.reaches(one, 80, 10)
    guest.api.pause(guest.sandbox.id)
    guest.allow(deny=[other])
    guest.api.resume(guest.sandbox.id)
    with around.listener(one, 80), around.listener(other, 80):
        assert not guest.reaches(other, 80, 0.5)
        assert guest.reaches(one, 80, 10)
    _attack(guest, around)
