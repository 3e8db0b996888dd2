"""What programs in a machine find, and what the files API keeps, where only a real one shows it."""

import base64

import pytest

from support.vm.rig import Api, Sandbox, error_of

pytestmark = pytest.mark.vm

_NAMES = "hostname; cat /etc/hostname; hostname -f; getent ahostsv4 $(hostname) | head -n1"
_LOOK_UP = """
import socket, time
began = time.monotonic()
assert socket.gethostbyname(socket.gethostname()) == "127.0.1.1"
print(socket.getfqdn(), time.monotonic() - began < 8)
"""
_STAMPS = "stat -c '%i %Y' /etc/hosts /etc/hostname /etc/machine-id; cat /etc/machine-id"
_ATTRIBUTES = """
import os, sys
for name in ("user.note", "system.posix_acl_access", "security.capability"):
    print(name, os.getxattr(sys.argv[1], name).hex())
"""
_DRESS = """
import os, struct
path = "/root/dressed"
open(path, "w").write("old")
os.chown(path, 65534, 12)
os.setxattr(path, "user.note", b"mine")
entries = ((1, 6, -1), (2, 4, 1), (4, 4, -1), (16, 6, -1), (32, 0, -1))
rights = (struct.pack("<HHI", tag, mode, number & 0xFFFFFFFF) for tag, mode, number in entries)
os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + b"".join(rights))
os.setxattr(path, "security.capability", struct.pack("<5I", 0x2000000, 1024, 0, 0, 0))
os.chmod(path, 0o4760)
"""


def _cycle(api: Api, sandbox: str) -> None:
    assert api.pause(sandbox).status == "paused"
    assert api.resume(sandbox).status == "running"


def _require_names(api: Api, sandbox: str) -> None:
    """All that names the machine says the same, and no name server is asked."""
    told = api.output(sandbox, _NAMES).splitlines()
    assert told[:3] == [sandbox] * 3
    assert told[3].split()[0] == "127.0.1.1"
    result = api.exec(sandbox, "python3", "-c", _LOOK_UP)
    assert result.stdout.split() == [sandbox, "True"], result
    assert api.exec(sandbox, "sudo", "true").stderr == ""


def test_emulated_programs_are_loaded_at_fixed_addresses(api: Api) -> None:
    sandbox = api.create().id
    clocks = api.output(sandbox, "cat /sys/devices/system/clocksource/*/available_clocksource")
    emulated = "kvm-clock" not in clocks
    maps = {api.output(sandbox, "grep -m1 libc /proc/self/maps") for _ in range(3)}
    assert (len(maps) == 1) == emulated


def test_the_names_agree_after_every_start(api: Api) -> None:
    sandbox = api.create().id
    # a name server that never answers: whoever asks it waits
    api.output(sandbox, "echo nameserver 192.0.2.1 > /etc/resolv.conf")
    _require_names(api, sandbox)
    api.output(sandbox, "echo '10.1.2.3 db # mine' >> /etc/hosts")
    before = api.output(sandbox, _STAMPS)
    _cycle(api, sandbox)
    assert api.output(sandbox, _STAMPS) == before
    api.output(sandbox, "hostname changed; echo changed > /etc/hostname")
    _cycle(api, sandbox)
    _require_names(api, sandbox)
    api.snapshot(sandbox, "named")
    clone = api.create(template="named").id
    _require_names(api, clone)
    hosts = api.output(clone, "cat /etc/hosts")
    assert "10.1.2.3 db # mine" in hosts.splitlines()
    assert (hosts.count(clone), hosts.count(sandbox), hosts.count("localhost")) == (1, 0, 3)
    assert api.output(clone, "cat /etc/machine-id") not in before
    api.delete(clone)
    assert api.request("DELETE", "/v1/snapshots/named").status_code == 204


def test_a_program_may_replace_the_machine_id(api: Api) -> None:
    sandbox = api.create().id
    assert api.output(sandbox, "cut -d' ' -f2 /proc/mounts | grep machine-id || true") == ""
    own = api.output(sandbox, "cat /etc/machine-id")
    assert len(bytes.fromhex(own)) == 16
    api.output(sandbox, "sed -i 's/[a-f]/0/g' /etc/machine-id; mv /etc/machine-id /etc/x")
    api.output(sandbox, "mv /etc/x /etc/machine-id")
    changed = api.output(sandbox, "cat /etc/machine-id")
    _cycle(api, sandbox)
    assert api.output(sandbox, "cat /etc/machine-id") == changed
    api.delete(sandbox)


def test_a_root_that_takes_no_names(api: Api) -> None:
    sandbox = api.create().id
    api.output(sandbox, "cd /etc; rm hosts hostname; mkdir hosts; mkfifo hostname")
    _cycle(api, sandbox)
    assert api.output(sandbox, "hostname; stat -c %F /etc/hosts /etc/hostname").splitlines() == [
        *(sandbox, "directory", "fifo")
    ]
    api.output(sandbox, "mv /etc /etc.away; sync; mount -o remount,ro /")
    _cycle(api, sandbox)
    assert api.output(sandbox, "hostname") == sandbox
    api.output(sandbox, "mount -o remount,rw /")
    _cycle(api, sandbox)
    assert api.output(sandbox, "cat /etc/hostname") == sandbox
    api.delete(sandbox)


def test_commands_speak_utf8(api: Api, sandbox: Sandbox) -> None:
    assert api.output(sandbox.id, "echo $LANG; locale charmap").split() == ["C.UTF-8", "UTF-8"]
    told = api.exec(sandbox.id, "locale", "charmap", envs={"LANG": "C"}).stdout
    assert told.strip() == "ANSI_X3.4-1968"
    assert api.output(sandbox.id, "bash -c 'x=é; echo ${#x}'") == "1"


def test_a_replaced_file_in_a_vm_keeps_its_user_and_mode(api: Api, sandbox: Sandbox) -> None:
    assert api.exec(sandbox.id, "python3", "-c", _DRESS).exit_code == 0
    look = ("python3", "-c", _ATTRIBUTES, "/root/dressed")
    before = api.exec(sandbox.id, *look).stdout
    assert before.count("\n") == 3
    shown = "stat -c '%u %g %a' dressed"
    assert api.output(sandbox.id, shown) == "65534 12 4760"
    for content in (b"renamed into place", b"written over" * 1000):
        _upload(api, sandbox.id, {"path": "dressed"}, content)
        assert api.exec(sandbox.id, *look).stdout == before
        assert api.output(sandbox.id, shown) == "65534 12 4760"
        wanted = str(len(content))
        assert api.output(sandbox.id, "wc -c < dressed; ln -f dressed link").strip() == wanted
    assert api.output(sandbox.id, "stat -c %h link; wc -c < link").split() == ["2", "12000"]


def test_whose_files_and_directories_are(api: Api, sandbox: Sandbox) -> None:
    _upload(api, sandbox.id, {"path": "made/below", "user": "nobody", "mode": "0750"}, b"x")
    body = {"path": "own", "user": "nobody", "mode": "1777"}
    answer = api.request("POST", f"/v1/sandboxes/{sandbox.id}/files/mkdir", body)
    assert answer.json()["entry"]["owner"] == "nobody"
    told = api.output(sandbox.id, "stat -c '%U %a' made made/below own").splitlines()
    assert told == ["nobody 755", "nobody 750", "nobody 1777"]


def test_paths_that_are_no_text(api: Api, sandbox: Sandbox) -> None:
    raw = base64.b64encode(b"/root/raw-\xff").decode()
    _upload(api, sandbox.id, {"raw_path": raw}, b"content")
    assert api.output(sandbox.id, "cat raw-$(printf '\\377')") == "content"
    answer = api.request("POST", f"/v1/sandboxes/{sandbox.id}/files/read", {"raw_path": raw})
    assert answer.content == b"content"
    for status in (204, 404):
        answer = api.request("POST", f"/v1/sandboxes/{sandbox.id}/files/remove", {"raw_path": raw})
        assert answer.status_code == status


def test_files_of_the_guests_kernel_are_read_and_written(api: Api, sandbox: Sandbox) -> None:
    path = "/proc/sys/vm/swappiness"
    _upload(api, sandbox.id, {"path": path}, b"7")
    answer = api.request("POST", f"/v1/sandboxes/{sandbox.id}/files/read", {"path": path})
    assert answer.content == b"7\n"
    answer = api.request("POST", f"/v1/sandboxes/{sandbox.id}/files/read", {"path": "/proc/2/exe"})
    assert error_of(answer).message.endswith("leads nowhere")


def _upload(api: Api, sandbox: str, fields: dict[str, str], content: bytes) -> None:
    answer = api.http.post(
        f"{api.server.url}/v1/sandboxes/{sandbox}/files/write",
        data=fields,
        files={"file": ("name", content)},
    )
    assert answer.status_code == 204, answer.text
