"""What programs expect of a machine: tools, limits, kernel modules, and a quick no."""

import re
import shlex
from collections.abc import Iterator

import pytest

from support.vm.outside import Outside, outside
from support.vm.rig import Api, Sandbox

pytestmark = pytest.mark.vm

_WATCH = """
import ctypes, os, tempfile
libc = ctypes.CDLL(None, use_errno=True)
fd, top, wanted = libc.inotify_init(), tempfile.mkdtemp(), 10_000
for number in range(wanted):
    path = os.path.join(top, str(number))
    os.close(os.open(path, os.O_CREAT))
    if libc.inotify_add_watch(fd, path.encode(), 2) < 0:
        raise OSError(ctypes.get_errno(), f"after {number} watches")
print(open(f"/proc/self/fdinfo/{fd}").read().count("inotify wd"))
"""
_FUSE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open("/dev/fuse", os.O_RDWR)
os.makedirs("/mnt/fuse", exist_ok=True)
options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
if libc.mount(b"test", b"/mnt/fuse", b"fuse", 0, options) < 0:
    raise OSError(ctypes.get_errno(), "mount")
print(len(os.read(fd, 65536)) > 40)  # what the kernel says first to a file system
libc.umount2(b"/mnt/fuse", 2)
"""
_CONNECT = """
import socket, sys
with socket.create_connection((sys.argv[1], 80), timeout=20) as peer:
    print(peer.recv(100).decode())
"""
_WHEEL = """
import sys, zipfile
with zipfile.ZipFile(sys.argv[1], "w") as wheel:
    wheel.writestr("wrenn_hello.py", "x = 1")
    about = "wrenn_hello-1.dist-info/"
    wheel.writestr(about + "METADATA", "Metadata-Version: 2.1\\nName: wrenn-hello\\nVersion: 1\\n")
    wheel.writestr(about + "WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
    wheel.writestr(about + "RECORD", "")
"""
_TOOLS = (
    *("bzip2", "curl", "file", "git", "gpg", "iptables", "jq", "less", "losetup", "lsof", "make"),
    *("modprobe", "nano", "nc", "patch", "pip", "ps", "pstree", "python", "rsync", "strace"),
    *("sudo", "tmux", "tree", "unzip", "vi", "wget", "xz", "zip", "zstd"),
)
_MODULES = (
    *("overlay", "fuse", "tun", "loop", "nbd", "squashfs", "isofs", "xfs", "dm-mod", "dm-crypt"),
    *("bridge", "br_netfilter", "veth", "vxlan", "macvlan", "ipvlan", "wireguard", "ip_vs"),
    *("nf_tables", "nft_chain_nat", "nft_masq", "nft_ct", "nft_compat", "nft_reject_inet"),
    *("nf_conntrack", "nf_nat", "ip_tables", "iptable_nat", "iptable_filter", "iptable_mangle"),
    *("xt_MASQUERADE", "xt_addrtype", "xt_conntrack", "xt_comment", "xt_mark", "xt_multiport"),
    *("ip_set", "sch_htb", "sch_tbf", "sch_ingress", "cls_basic", "cls_u32", "tcp_bbr"),
    *("binfmt_misc", "nfs", "cifs", "vfat"),
)


@pytest.fixture(scope="module")
def around() -> Iterator[Outside]:
    with outside() as found:
        yield found


def _without_internet(api: Api, sandbox: Sandbox, internet: bool) -> None:
    path = f"/v1/sandboxes/{sandbox.id}/network"
    assert api.request("PUT", path, {"internet": internet}).status_code == 200


def test_a_vm_without_internet_refuses_name_lookups_at_once(api: Api, sandbox: Sandbox) -> None:
    _without_internet(api, sandbox, False)
    for command in (("getent", "hosts", "example.com"), ("getent", "hosts", "192.0.2.1")):
        done = api.exec(sandbox.id, *command, timeout_sec=60)
        assert done.exit_code == 2
        assert done.duration_ms < 1500
    done = api.exec(sandbox.id, "curl", "-sS", "https://example.com", timeout_sec=60)
    assert "Could not resolve" in done.stderr
    assert done.duration_ms < 4000  # most of it is the start of curl on an emulated processor
    _without_internet(api, sandbox, True)


def test_the_tools_are_there(api: Api, sandbox: Sandbox) -> None:
    script = f"for each in {' '.join(_TOOLS)}; do command -v $each >/dev/null || echo $each; done"
    assert api.output(sandbox.id, script) == ""
    assert "C.utf8" in api.output(sandbox.id, "locale -a").split()
    assert api.output(sandbox.id, "python --version").startswith("Python 3.")
    api.output(sandbox.id, "python -c 'import ensurepip, venv'")


def test_pip_installs_without_a_virtual_environment(api: Api, sandbox: Sandbox) -> None:
    wheel = "/tmp/wrenn_hello-1-py3-none-any.whl"
    api.output(sandbox.id, f"python -c {shlex.quote(_WHEEL)} {wheel}")
    done = api.exec(sandbox.id, "pip", "install", "--no-index", wheel, timeout_sec=120)
    assert (done.exit_code, done.stderr) == (0, "")
    assert api.output(sandbox.id, "cd / && python -c 'import wrenn_hello as w; print(w.x)'") == "1"


def test_limits_are_those_of_a_developers_machine(api: Api, sandbox: Sandbox) -> None:
    limits = dict(
        line.split(" = ")
        for line in api.output(
            sandbox.id,
            "sysctl fs.inotify.max_user_watches fs.inotify.max_user_instances fs.file-max "
            "fs.nr_open fs.aio-max-nr net.core.somaxconn vm.max_map_count kernel.pid_max "
            "kernel.keys.maxkeys net.core.rmem_max net.ipv4.ip_unprivileged_port_start",
        ).splitlines()
    )
    least = {
        "fs.inotify.max_user_watches": 65_536,
        "fs.inotify.max_user_instances": 1024,
        "fs.file-max": 1_048_576,
        "fs.nr_open": 1_048_576,
        "fs.aio-max-nr": 1_048_576,
        "net.core.somaxconn": 4096,
        "vm.max_map_count": 262_144,
        "kernel.pid_max": 4_194_304,
        "kernel.keys.maxkeys": 2000,
        "net.core.rmem_max": 7_500_000,
    }
    assert int(limits.pop("net.ipv4.ip_unprivileged_port_start")) == 0
    assert {name for name, value in limits.items() if int(value) < least[name]} == set()
    assert api.output(sandbox.id, "ulimit -Sn; ulimit -Hn").split() == ["65536", "1048576"]


def test_more_files_are_watched_than_a_kernel_allows_by_itself(api: Api, sandbox: Sandbox) -> None:
    done = api.exec(sandbox.id, "python3", "-c", _WATCH, timeout_sec=120)
    assert done.stdout == "10000\n", done.stderr


def test_modules_load_when_they_are_needed(api: Api, sandbox: Sandbox) -> None:
    """By the kernel itself, also where the root has no program for it."""
    script = """
        set -e
        kmod=$(readlink -f /sbin/modprobe)
        mv $kmod /kmod-away
        trap 'mv /kmod-away $kmod' EXIT
        ! grep -qE '^(overlay|loop|tun|dummy) ' /proc/modules
        mkdir -p /tmp/o && cd /tmp/o && mkdir lower layers merged
        echo below > lower/file
        mount -t tmpfs layers layers && mkdir layers/upper layers/work
        layers=lowerdir=lower,upperdir=layers/upper,workdir=layers/work
        mount -t overlay -o $layers none merged
        echo above > merged/file
        cat lower/file layers/upper/file
        head -c 1048576 /dev/urandom > /tmp/image
        device=$(losetup --find --show /tmp/image)
        cmp $device /tmp/image && losetup --detach $device && echo loop
        ip tuntap add dev tun9 mode tun && ip link del tun9 && echo tun
        ip link add dummy9 type dummy && ip link del dummy9 && echo dummy
    """
    assert api.output(sandbox.id, script).split() == ["below", "above", "loop", "tun", "dummy"]
    done = api.exec(sandbox.id, "python3", "-c", _FUSE, timeout_sec=60)
    assert done.stdout == "True\n", done.stderr
    modes = api.output(sandbox.id, "stat -c %a /dev/fuse /dev/net/tun /dev/loop-control")
    assert modes.split() == ["666", "666", "600"]


def test_a_container_network_reaches_the_outside(
    api: Api, sandbox: Sandbox, around: Outside
) -> None:
    """A namespace on a bridge, translated on its way out: what container engines make."""
    server = around.servers[0]
    script = f"""
        exec > /tmp/out 2>&1
        trap 'echo done' EXIT
        set -e
        ip netns add inner
        ip link add bridge0 type bridge && ip addr add 10.88.0.1/16 dev bridge0
        ip link set bridge0 up
        ip link add outer0 type veth peer name eth0 netns inner
        ip link set outer0 master bridge0 up
        ip -n inner link set lo up && ip -n inner link set eth0 up
        ip -n inner addr add 10.88.0.2/16 dev eth0 && ip -n inner route add default via 10.88.0.1
        echo 1 > /proc/sys/net/ipv4/ip_forward
        iptables -t nat -A POSTROUTING -s 10.88.0.0/16 ! -o bridge0 -j MASQUERADE
        iptables -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
        iptables -A FORWARD -i bridge0 -m comment --comment test -j ACCEPT
        iptables-legacy -t nat -nL > /dev/null
        ip netns exec inner python3 -c {shlex.quote(_CONNECT)} {server}
    """
    with around.listener(server, 80) as listener:
        started = api.request(
            "POST",
            f"/v1/sandboxes/{sandbox.id}/exec",
            {"cmd": "sh", "args": ["-c", script], "background": True},
        )
        assert started.status_code in (200, 201, 202), started.text
        try:
            listener.settimeout(60)
            peer, _ = listener.accept()
        except TimeoutError:
            pytest.fail(api.output(sandbox.id, "cat /tmp/out"))
        with peer:
            peer.sendall(b"through two translations")
        wait = "for each in $(seq 100); do grep -q done /tmp/out && break; sleep 0.1; done"
        assert "through two translations" in api.output(sandbox.id, f"{wait}; cat /tmp/out")


def test_every_module_that_engines_and_tunnels_ask_for_loads(api: Api, sandbox: Sandbox) -> None:
    done = api.exec(sandbox.id, "modprobe", "-a", *_MODULES, timeout_sec=180)
    assert done.exit_code == 0, done.stderr
    loaded = set(re.findall(r"^\w+", api.output(sandbox.id, "cat /proc/modules"), re.M))
    assert {each.replace("-", "_") for each in _MODULES} - loaded == set()
    api.output(sandbox.id, "depmod -a && modprobe btrfs && grep -q btrfs /proc/filesystems")
