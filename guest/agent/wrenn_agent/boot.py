"""What the first process of a VM does at boot, after `init`: limits, modules, control groups."""

from __future__ import annotations

import os
import resource
import signal
import stat

from .cgroups import CommandGroups
from .loop import report

_MB = 1 << 20
_SYSCTLS = "/proc/sys"
_MODULES = "/lib/modules"
_FOR_EVERYBODY = ("fuse", "net/tun")
"""Devices that everybody may open, as udev has it."""
_RUNTIME = "/run/.wrenn"
_NICE = -10
_OPEN_FILES = (65536, 1048576)
"""Of commands, soft and hard: databases and build tools ask for 64000."""


def set_up() -> CommandGroups | None:
    """Prepare this machine; a step that fails is reported and does not stop the others.

    Returns the control groups of commands; None where they cannot be made.
    """
    for step in (_raise_open_files, raise_limits, offer_modules, _stay_responsive):
        try:
            step()
        except (OSError, ValueError) as error:
            report(error)
    try:
        return CommandGroups.set_up()
    except OSError as error:
        report(error)
        return None


def _raise_open_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, _OPEN_FILES)


def _stay_responsive() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # commands start with the ordinary priority, whatever the agent's
    os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)


def raise_limits() -> None:
    """Set what developers' tools need more of than a kernel gives; the rest is still set when
    one setting fails, and one that this kernel does not have is left out."""
    memory_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _MB
    for name, value in sysctls(memory_mb).items():
        try:
            _set(name, value)
        except FileNotFoundError:
            continue
        except OSError as error:
            report(error)


def sysctls(memory_mb: int) -> dict[str, str]:
    """The settings below /proc/sys of a guest with so much memory.

    A watch holds about 1 KiB of the kernel's memory, so all of them get an eighth of it, and
    never fewer than a small project needs. The other limits cost nothing until they are used.
    """
    watches = min(max(memory_mb * 128, 65_536), 1_048_576)
    return {
        # file watchers: editors, bundlers and test runners that wait for changes
        "fs/inotify/max_user_watches": str(watches),
        "fs/inotify/max_user_instances": "1024",
        "fs/inotify/max_queued_events": "65536",
        # files: as systemd has it, and as databases with asynchronous I/O ask for
        "fs/file-max": "9223372036854775807",
        "fs/nr_open": "1048576",
        "fs/aio-max-nr": "1048576",
        # processes and memory maps: Elasticsearch asks for 262144 maps, distributions give more
        "kernel/pid_max": "4194304",
        "vm/max_map_count": "1048576",
        # of each second real-time loops get 0.8, what answers the host finds a place in the rest
        "kernel/sched_rt_runtime_us": "800000",
        # each container has a keyring
        "kernel/keys/maxkeys": "20000",
        "kernel/keys/maxbytes": "2000000",
        # servers under load, and buffers that implementations of QUIC ask for
        "net/core/somaxconn": "65535",
        "net/ipv4/tcp_max_syn_backlog": "8192",
        "net/core/rmem_max": "7500000",
        "net/core/wmem_max": "7500000",
        # everybody may serve on port 80, ping, and profile or trace their own programs
        "net/ipv4/ip_unprivileged_port_start": "0",
        "net/ipv4/ping_group_range": "0 2147483647",
        "kernel/perf_event_paranoid": "1",
        "kernel/yama/ptrace_scope": "0",
    }


def offer_modules() -> None:
    """Let this kernel's modules be found, whatever the root holds.

    The root gets a directory of links to the runtime's modules, so that `depmod` and packages can
    add to it; a root with a tree of its own keeps that. What the kernel wants by itself is
    loaded by a program of the runtime's. Devices whose drivers are modules get their nodes.
    """
    release = os.uname().release
    tree = os.path.join(_RUNTIME, "modules", release)
    if not os.path.isdir(tree):
        return  # the runtime of an older template
    with open(os.path.join(tree, "modules.devname"), encoding="ascii") as file:
        for name, mode, device in device_nodes(file.read()):
            _make_node(os.path.join("/dev", name), mode, device)
    _set("kernel/modprobe", os.path.join(_RUNTIME, "bin/modprobe"))
    link_tree(tree, os.path.join(_MODULES, release))


def link_tree(source: str, target: str) -> None:
    """Fill the directory `target` with links to all that `source` holds, unless it has a tree."""
    if os.path.lexists(os.path.join(target, "kernel")):
        return
    os.makedirs(target, exist_ok=True)
    for name in os.listdir(source):
        link = os.path.join(target, name)
        if not os.path.lexists(link):
            os.symlink(os.path.join(source, name), link)


def device_nodes(text: str) -> list[tuple[str, int, int]]:
    """Name, mode and number of the devices whose modules the kernel loads when they are opened.

    `text` is a `modules.devname`: lines of a module, a name below /dev, and type and number, such
    as `fuse fuse c10:229`.
    """
    found = []
    for line in text.splitlines():
        if line.startswith("#") or not line:
            continue
        _, name, number = line.split()
        major, minor = number[1:].split(":")
        kind = stat.S_IFBLK if number[0] == "b" else stat.S_IFCHR
        mode = kind | (0o666 if name in _FOR_EVERYBODY else 0o600)
        found.append((name, mode, os.makedev(int(major), int(minor))))
    return found


def _make_node(path: str, mode: int, device: int) -> None:
    if not os.path.lexists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mknod(path, mode, device)
        os.chmod(path, stat.S_IMODE(mode))  # whatever the mask of this process


def _set(name: str, value: str) -> None:
    with open(os.path.join(_SYSCTLS, name), "w", encoding="ascii") as file:
        file.write(value)
