"""A guest whose root exhausts it still answers the next command."""

import contextlib
import time
from dataclasses import dataclass

import pytest

from support.vm.rig import Api, NewRig, Sandbox
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.vm

_ATTACK_SEC = 2.5
"""How long an attack goes on before the next command."""
_ANSWER_SEC = 5.0


@dataclass(frozen=True)
class Attack:
    """A script that takes all there is of something, or breaks something; bash ones then wait."""

    name: str
    script: str
    interpreter: str = "bash"


ATTACKS = (
    Attack(
        "fork storm",
        "f(){ f|f& }; f",
    ),
    Attack(
        "fork storm in sessions of its own",
        'export B=\'setsid bash -c "$B"& setsid bash -c "$B"& sleep 60\'; eval "$B"',
    ),
    Attack(
        "threads",
        """\
import threading, time
try:
    while True:
        threading.Thread(target=time.sleep, args=(60,)).start()
except RuntimeError:
    time.sleep(60)
""",
        "python3",
    ),
    Attack(
        "zombies",
        """\
import os, time
while True:
    try:
        os.fork() or os._exit(0)
    except OSError:
        time.sleep(60)
""",
        "python3",
    ),
    Attack(
        "memory",
        "for i in $(seq 9); do tail /dev/zero & done; wait",
    ),
    Attack(
        "memory file systems",
        "for i in /dev/shm /run; do head -c 2G /dev/zero >$i/full; done",
    ),
    Attack(
        "inodes",
        """\
import itertools, time
try:
    for number in itertools.count():
        open(f"/dev/shm/{number}", "w").close()
except OSError:
    time.sleep(60)
""",
        "python3",
    ),
    Attack(
        "open files",
        """\
import resource, time
resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20, 1 << 20))
files = []
try:
    while True:
        files.append(open("/dev/null"))
except (OSError, MemoryError):
    time.sleep(60)
""",
        "python3",
    ),
    Attack(
        "pipes",
        """\
import os, time
try:
    while True:
        os.write(os.pipe()[1], bytes(65536))
except OSError:
    time.sleep(60)
""",
        "python3",
    ),
    Attack(
        "sockets",
        """\
import socket, time
pairs = []
try:
    while True:
        pairs.append(socket.socketpair())
        pairs[-1][0].send(bytes(100000))
except OSError:
    time.sleep(60)
""",
        "python3",
    ),
    Attack(
        "inotify",
        """\
import ctypes, os, time
libc = ctypes.CDLL(None)
while (instance := libc.inotify_init()) >= 0:
    pass
for number in range(200000):
    os.mkdir(f"/dev/shm/{number}")
    libc.inotify_add_watch(5, f"/dev/shm/{number}".encode(), 2)
time.sleep(60)
""",
        "python3",
    ),
    Attack(
        "terminals",
        """\
import os, time
try:
    while True:
        os.openpty()
except OSError:
    time.sleep(60)
""",
        "python3",
    ),
    Attack(
        "disk",
        "fallocate -l $(stat -f -c '%a*%S' / | { read n; echo $((n)); }) /full; echo more >/more",
    ),
    Attack(
        "real-time loops",
        "for i in 1 2 3; do chrt -f 99 sh -c 'while :; do :; done' & done",
    ),
    Attack(
        "loops of the highest priority",
        "for i in $(seq 50); do nice -n -20 sh -c 'while :; do :; done' & done",
    ),
    Attack(
        "SIGSTOP to everybody",
        "kill -STOP -1",
    ),
    Attack(
        "SIGKILL to everybody",
        "kill -9 -1",
    ),
    Attack(
        "SysRq",
        "echo 1 >/proc/sys/kernel/sysrq; for i in f e i; do echo $i >/proc/sysrq-trigger; done",
    ),
    Attack(
        "moved to another group",
        "echo $$ >/sys/fs/cgroup/cgroup.procs; f(){ f|f& }; f",
    ),
    Attack(
        "groups without limits",
        "for i in $(find /sys/fs/cgroup -name '*.max'); do echo max >$i; done; f(){ f|f& }; f",
    ),
    Attack(
        "frozen groups",
        "echo 1 >/sys/fs/cgroup/cgroup.freeze",
    ),
    Attack(
        "killed groups",
        "echo 1 >/sys/fs/cgroup/cgroup.kill",
    ),
    Attack(
        "removed groups",
        "while :; do rmdir /sys/fs/cgroup/*/; mkdir /sys/fs/cgroup/$((i += 1)); done 2>/dev/null",
    ),
    Attack(
        "connections to the agent",
        """\
import socket, time
sockets = []
while len(sockets) < 4000:
    try:
        sockets.append(socket.create_connection(("127.0.0.1", 49983)))
        sockets[-1].send(b"GET /")
    except OSError:
        time.sleep(1)
time.sleep(60)
""",
        "python3",
    ),
    Attack(
        "mounts over everything",
        "for i in /run /proc /dev /tmp /sys/fs/cgroup; do mount -t tmpfs none $i; done",
    ),
    Attack(
        "read-only root",
        "mount -o remount,ro /",
    ),
    Attack(
        "kernel limits",
        "cd /proc/sys; echo 301 >kernel/pid_max; echo 9 >fs/file-max; echo 2 >vm/overcommit_memory",
    ),
    Attack(
        "priority of the agent",
        """\
renice 19 -p 1
chrt -i -p 0 1
for i in $(seq 50); do nice -n -20 sh -c 'while :; do :; done' & done
""",
    ),
    Attack(
        "output",
        "yes",
    ),
)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda each: each.name.replace(" ", "-"))
def test_next_command_is_answered_during_and_after(api: Api, attack: Attack) -> None:
    sandbox = api.create()
    try:
        started = api.request(
            "POST",
            f"/v1/sandboxes/{sandbox.id}/exec",
            {
                "cmd": attack.interpreter,
                "args": ["-c", attack.script + "\nsleep 60" * (attack.interpreter == "bash")],
                "background": True,
                "tag": "attack",
            },
        )
        assert started.status_code == 202, started.text
        time.sleep(_ATTACK_SEC)
        _assert_answers(api, sandbox)
        ended = api.request("DELETE", f"/v1/sandboxes/{sandbox.id}/processes/attack")
        assert ended.status_code in (204, 404), ended.text
        _assert_answers(api, sandbox)
    finally:
        api.delete(sandbox.id)


def _assert_answers(api: Api, sandbox: Sandbox) -> None:
    began = time.monotonic()
    assert api.exec(sandbox.id, "echo", "here").stdout == "here\n"
    assert time.monotonic() - began < patience(_ANSWER_SEC)


def test_timeout_ends_all_that_the_command_started(api: Api, sandbox: Sandbox) -> None:
    """What a daemon does to leave its process group does not help it."""
    script = "setsid sh -c 'sleep 987 & exec sleep 987' & sleep 987"
    answer = api.exec_raw(sandbox.id, "sh", "-c", script, timeout_sec=1)
    assert answer.status_code == 504
    assert api.exec(sandbox.id, "pgrep", "-f", "sleep 987").exit_code == 1


def test_timeout_leaves_other_commands_alone(api: Api, sandbox: Sandbox) -> None:
    path = f"/v1/sandboxes/{sandbox.id}/exec"
    background = {"cmd": "sleep", "args": ["876"], "background": True}
    assert api.request("POST", path, background).status_code == 202
    api.exec(sandbox.id, "sh", "-c", "sleep 765 >/dev/null 2>&1 &")
    assert api.exec_raw(sandbox.id, "sleep", "654", timeout_sec=1).status_code == 504
    for seconds, left in (("876", True), ("765", True), ("654", False)):
        found = api.exec(sandbox.id, "pgrep", "-x", "-f", f"sleep {seconds}")
        assert (found.exit_code == 0) is left
        api.exec(sandbox.id, "pkill", "-x", "-f", f"sleep {seconds}")


def test_control_groups_are_used_again(api: Api, sandbox: Sandbox) -> None:
    groups = "ls -d /sys/fs/cgroup/command-* | wc -l"
    before = int(api.output(sandbox.id, groups))
    for _ in range(20):
        api.exec(sandbox.id, "true")
    assert int(api.output(sandbox.id, groups)) == before


def test_commands_cannot_leave_their_control_groups(api: Api, sandbox: Sandbox) -> None:
    """They see their own part of the tree as the whole of it, and may divide it further."""
    assert api.output(sandbox.id, "cat /proc/self/cgroup").startswith("0::/command-")
    script = (
        "cd /sys/fs/cgroup && test ! -e agent && ! echo max >pids.max && "
        "mkdir mine && echo $$ >mine/cgroup.procs && cat /proc/self/cgroup && "
        "echo $$ >$(ls -d command-* | head -n 1)/cgroup.procs && rmdir mine"
    )
    assert api.output(sandbox.id, script) == "0::/mine"


def test_limits_are_settings_and_shown_in_metrics(new_rig: NewRig) -> None:
    _, api = new_rig(WRENN_GUEST_PROCESSES="64", WRENN_GUEST_RESERVED_MB="64")
    with contextlib.closing(api):
        sandbox = api.create()
        metrics = api.request("GET", f"/v1/sandboxes/{sandbox.id}/metrics").json()
        assert metrics["process_limit"] == 64
        assert metrics["mem_limit"] == metrics["mem_total"] - (64 << 20)
        assert metrics["process_count"] == 0
        script = "for i in $(seq 100); do sleep 60 & done; sleep 60"
        api.exec_raw(sandbox.id, "bash", "-c", script, timeout_sec=2)
        assert api.exec(sandbox.id, "true").exit_code == 0


def test_timeout_ends_a_command_that_moved_to_another_group(api: Api, sandbox: Sandbox) -> None:
    script = "cd /sys/fs/cgroup; mkdir moved; echo $$ >moved/cgroup.procs; exec sleep 543"
    assert api.exec_raw(sandbox.id, "sh", "-c", script, timeout_sec=1).status_code == 504
    assert api.exec(sandbox.id, "pgrep", "-x", "-f", "sleep 543").exit_code == 1
    api.output(sandbox.id, "rmdir /sys/fs/cgroup/moved")


def test_command_that_divides_its_group_leaves_the_next_one_alone(
    api: Api, sandbox: Sandbox
) -> None:
    """Into a group that hands controllers on no process can go: another one is taken."""
    script = (
        "cd /sys/fs/cgroup/$(cut -d: -f3 /proc/self/cgroup) && "
        "if mkdir inner; then "
        "echo $$ >inner/cgroup.procs && echo +pids >cgroup.subtree_control; fi"
    )
    for _ in range(3):
        api.output(sandbox.id, script)
        assert api.exec(sandbox.id, "true").exit_code == 0
