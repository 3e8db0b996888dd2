"""Machines without slots of their own: the monitor is the network, and it leads nowhere."""

import contextlib
import json
import socket
import subprocess
import time

import pytest

from support.vm.rig import NewRig
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.vm

_KNOCK = """
import json, socket, sys
answered = []
for address, port in json.loads(sys.argv[1]):
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        for each in tcp, udp:
            each.settimeout(0.5)
        try:
            udp.sendto(b"knock", (address, port))
            udp.recv(100)
            answered.append(["udp", address])
        except OSError:
            pass
        try:
            tcp.connect((address, port))
            answered.append(["tcp", address])
        except OSError:
            pass
print(json.dumps(answered))
"""


def _own_addresses() -> list[str]:
    argv = ["ip", "-json", "-4", "address", "show", "scope", "global"]
    found = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    return [str(each["local"]) for link in found for each in link["addr_info"]]


def test_user_mode_networking_leads_nowhere(new_rig: NewRig) -> None:
    """The address of the gateway would be this machine's own loopback."""
    rig, api = new_rig(WRENN_NETWORK="user")
    sandbox = api.create().id
    assert rig.namespace_of(rig.machine_of(sandbox)) is None
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("0.0.0.0", 0)))
        udp = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        port = tcp.getsockname()[1]
        udp.bind(("0.0.0.0", port))
        gateway, name_server = "169.254.0.22", "169.254.0.23"
        targets = [(each, port) for each in (gateway, name_server, *_own_addresses())]
        order = json.dumps([*targets, (gateway, 53), (name_server, 53)])
        assert api.exec(sandbox, "python3", "-c", _KNOCK, order).stdout == "[]\n"
        for each in tcp, udp:
            each.setblocking(False)
            with pytest.raises(BlockingIOError):
                each.accept() if each is tcp else each.recv(100)
        began = time.monotonic()
        assert api.exec(sandbox, "getent", "hosts", "example.com").exit_code == 2
        script = "import socket; socket.create_connection(('203.0.113.1', 80), 30)"
        assert "No route" in api.exec(sandbox, "python3", "-c", script).stderr
        assert time.monotonic() - began < patience(5)
    api.pause(sandbox)
    api.resume(sandbox)
    assert api.output(sandbox, "echo awake") == "awake"
