"""Pause and resume: what a sandbox was doing goes on as if nothing had happened."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from support.vm.rig import Api, NewRig, Rig, error_of, eventually, is_alive
from wrenn_sandbox.patience import patience, slowness

pytestmark = pytest.mark.vm

_CYCLES = 10 if slowness() == 1 else 4
_CLOCK_SEC = 0.1
_KEEPER = """
import hashlib, os, socketserver

data = os.urandom(16 << 20)
scratch = bytearray(4 << 20)

def answer(command):
    if command == "digest":
        return hashlib.sha256(data).hexdigest()
    if command == "fill":
        scratch[:] = b"Z" * len(scratch)
    if command == "clear":
        scratch[:] = bytes(len(scratch))
    return f"{scratch.count(0)} {scratch.count(b'Z')} of {len(scratch)}"

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(answer(line.decode().strip()).encode() + b"\\n")

socketserver.TCPServer.allow_reuse_address = True
socketserver.TCPServer(("127.0.0.1", 5000), Handler).serve_forever()
"""
_CLIENT = """
mkfifo /tmp/ask /tmp/answer
until exec 3<>/dev/tcp/127.0.0.1/5000; do sleep 0.1; done
while :; do
    read -r line < /tmp/ask
    echo "$line" >&3
    read -r answer <&3
    echo "$answer" > /tmp/answer
done
"""
_COUNTER = """
i=0
while :; do
    i=$((i+1))
    echo "$i $$" > /tmp/count.new
    mv /tmp/count.new /tmp/count
    sleep 0.1
done
"""


def _background(api: Api, sandbox: str, *argv: str) -> None:
    """Start a program that outlives the command which starts it."""
    script = 'setsid "$@" >/tmp/background.log 2>&1 </dev/null &'
    assert api.exec(sandbox, "sh", "-c", script, "sh", *argv).exit_code == 0


def _ask(api: Api, sandbox: str, what: str) -> str:
    """The keeper's answer, through the connection that was opened before the first pause."""
    result = api.exec(sandbox, "sh", "-c", f"echo {what} > /tmp/ask; cat /tmp/answer")
    assert result.exit_code == 0, result
    return result.stdout.strip()


def _count(api: Api, sandbox: str) -> tuple[int, int]:
    """How far the counter is, and its pid."""
    count, pid = api.output(sandbox, "cat /tmp/count").split()
    return int(count), int(pid)


def _clock_error(api: Api, sandbox: str) -> float:
    """Seconds by which the guest's clock is at least wrong."""
    before = time.time()
    guest = float(api.output(sandbox, "exec bash -c 'echo $EPOCHREALTIME'"))
    after = time.time()
    return max(before - guest, guest - after, 0.0)


def _cycle(api: Api, sandbox: str) -> None:
    assert api.pause(sandbox).status == "paused"
    assert api.resume(sandbox).status == "running"


def test_memory_and_files_survive_cycles(rig: Rig, api: Api) -> None:
    sandbox = api.create().id
    _background(api, sandbox, "python3", "-c", _KEEPER)
    _background(api, sandbox, "bash", "-c", _CLIENT)
    _background(api, sandbox, "sh", "-c", _COUNTER)
    api.output(sandbox, "head -c 4M /dev/urandom > /tmp/file; head -c 4M /dev/urandom > /root/file")
    files = api.output(sandbox, "sync; sha256sum /tmp/file /root/file")
    digest = _ask(api, sandbox, "digest")
    assert len(digest) == 64
    count, counter = _count(api, sandbox)
    sums = []
    for cycle in range(_CYCLES):
        filled = cycle % 2 == 0
        _ask(api, sandbox, "fill" if filled else "clear")
        sums.append(
            api.output(
                sandbox,
                f"head -c 1M /dev/urandom > /root/file{cycle}; sha256sum /root/file{cycle}",
            )
        )
        machine = rig.machine_of(sandbox)
        before = count
        assert api.pause(sandbox).status == "paused"
        assert not is_alive(machine)
        assert api.resume(sandbox).status == "running"
        assert _clock_error(api, sandbox) < _CLOCK_SEC
        assert _ask(api, sandbox, "look") == (
            f"0 {4 << 20} of {4 << 20}" if filled else f"{4 << 20} 0 of {4 << 20}"
        )
        assert _ask(api, sandbox, "digest") == digest
        assert api.output(sandbox, "sha256sum /tmp/file /root/file") == files
        assert eventually(lambda before=before: _count(api, sandbox)[0] > before + 1, within=20)  # type: ignore[misc]
        count, pid = _count(api, sandbox)
        assert pid == counter
    assert api.output(sandbox, "dmesg | grep -ciE 'error|corrupt|bug:' || true") == "0"
    api.output(sandbox, "sync; echo 3 > /proc/sys/vm/drop_caches")
    assert api.output(sandbox, "sha256sum /tmp/file /root/file") == files
    assert api.output(sandbox, "sha256sum /root/file?").splitlines() == sums
    api.delete(sandbox)
    assert rig.stored_of(sandbox) == set()


def test_clones_of_a_template_differ(rig: Rig, api: Api) -> None:
    with ThreadPoolExecutor(2) as pool:
        clones = [made.id for made in pool.map(lambda _: api.create(), range(2))]
    script = (
        "hostname; cat /etc/machine-id; od -An -tx1 -N16 /dev/urandom; "
        "python3 -c 'import uuid; print(uuid.uuid4())'"
    )
    first, second = (api.output(clone, script).splitlines() for clone in clones)
    assert len(first) == 4
    assert [line for line in first if line in second] == []
    assert first[0] == clones[0]
    assert rig.token_of(clones[0]) != rig.token_of(clones[1])
    for clone in clones:
        api.delete(clone)


def test_a_resumed_sandbox_draws_new_random_numbers(rig: Rig, api: Api) -> None:
    """Neither a second resume of what was stored nor the sandbox itself repeats what it drew."""
    sandbox = api.create().id
    seen = [api.output(sandbox, "od -An -tx1 -N16 /dev/urandom")]
    tokens = [rig.token_of(sandbox)]
    for _ in range(2):
        _cycle(api, sandbox)
        seen.append(api.output(sandbox, "od -An -tx1 -N16 /dev/urandom"))
        tokens.append(rig.token_of(sandbox))
    assert len(set(seen)) == len(set(tokens)) == 3
    assert [api.agent_status(sandbox, token) for token in tokens] == ["401", "401", "200"]
    assert api.output(sandbox, "hostname") == sandbox
    api.delete(sandbox)


def test_what_is_not_possible_in_a_state(api: Api) -> None:
    sandbox = api.create().id
    answer = api.request("POST", f"/v1/sandboxes/{sandbox}/resume")
    assert (answer.status_code, error_of(answer).code) == (409, "invalid_state")
    api.pause(sandbox)
    for verb in ("pause", "ping"):
        answer = api.request("POST", f"/v1/sandboxes/{sandbox}/{verb}")
        assert (answer.status_code, error_of(answer).code) == (409, "invalid_state")
    answer = api.exec_raw(sandbox, "true")
    assert (answer.status_code, error_of(answer).code) == (409, "invalid_state")
    assert "paused" in error_of(answer).message
    api.delete(sandbox)


def test_a_pause_frees_the_machine_and_keeps_only_files(rig: Rig, api: Api) -> None:
    sandbox = api.create().id
    machine = rig.machine_of(sandbox)
    namespace = rig.namespace_of(machine)
    api.pause(sandbox)
    assert not is_alive(machine)
    assert sandbox not in rig.run_directories()
    assert eventually(lambda: namespace is None or not namespace.exists(), within=5)
    assert len(rig.stored_of(sandbox)) == 1
    api.delete(sandbox)
    assert rig.stored_of(sandbox) == set()
    assert not (rig.data_dir / "paused" / sandbox).exists()
    assert api.get(sandbox).status == "stopped"


def test_what_a_monitor_may_write_to(rig: Rig, api: Api) -> None:
    """Its disk, and nothing that the server reads or writes as root by its path."""
    sandbox = api.create().id
    [record] = [each for each in rig.journals() if each.sandbox_id == sandbox]
    directory = rig.data_dir / "run" / record.machine_id
    own = {"disk", "vmm.log"} if record.driver == "firecracker" else {"disk"}
    for path in (directory, *directory.iterdir()):
        status = path.lstat()
        assert (status.st_uid == 0) == (path.name not in own), path
        assert path.is_symlink() or status.st_mode & 0o022 == 0, path
    api.pause(sandbox)
    for path in (rig.data_dir / "paused" / sandbox).rglob("*"):
        assert path.lstat().st_uid == 0, path
        assert path.lstat().st_mode & 0o022 == 0, path
    api.resume(sandbox)
    assert api.output(sandbox, "echo here") == "here"
    api.delete(sandbox)


def test_a_command_that_runs_when_its_sandbox_is_paused(api: Api) -> None:
    """Its caller is told; the command itself goes on after the resume."""
    sandbox = api.create().id
    steps = f"for i in 1 2 3; do echo $i > /tmp/step; sleep {patience(2)}; done"
    script = f"{steps}; echo end > /tmp/step"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(api.exec_raw, sandbox, "sh", "-c", script)
        assert eventually(lambda: api.exec(sandbox, "test", "-e", "/tmp/step").exit_code == 0, 20)
        api.pause(sandbox)
        answer = running.result(timeout=patience(10))
    assert answer.status_code in (404, 409, 502)
    assert error_of(answer).message
    api.resume(sandbox)
    assert eventually(lambda: api.output(sandbox, "cat /tmp/step") == "end", within=30)
    api.delete(sandbox)


def _ask_and_leave(api: Api, sandbox: str, event: str) -> None:
    """Ask for a change, and hang up once the server has begun with it."""
    url = httpx2.URL(api.server.url)
    assert url.port is not None
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(
            f"POST /v1/sandboxes/{sandbox}/{event} HTTP/1.1\r\nHost: {url.host}\r\n"
            f"X-API-Key: {api.http.headers['X-API-Key']}\r\nContent-Length: 0\r\n\r\n".encode()
        )
        path = f"/v1/sandboxes/{sandbox}/events?limit=1"
        assert eventually(lambda: api.request("GET", path).json()[0]["event"] == event, within=20)


def test_a_client_that_leaves_does_not_stop_a_pause(api: Api) -> None:
    sandbox = api.create().id
    api.output(sandbox, "head -c 64M /dev/urandom > /dev/shm/much")  # both take a while then
    _ask_and_leave(api, sandbox, "pause")
    assert eventually(lambda: api.get(sandbox).status == "paused", within=20)
    _ask_and_leave(api, sandbox, "resume")
    assert eventually(lambda: api.get(sandbox).status == "running", within=20)
    assert api.output(sandbox, "echo here") == "here"
    api.delete(sandbox)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_the_server_goes_while_a_sandbox_is_paused(new_rig: NewRig, end: str) -> None:
    rig, api = new_rig()
    sandbox = api.create().id
    _background(api, sandbox, "sh", "-c", _COUNTER)
    assert eventually(lambda: api.exec(sandbox, "test", "-e", "/tmp/count").exit_code == 0, 20)
    api.pause(sandbox)
    ending: Callable[[], int] = getattr(rig.server, end)
    ending()
    assert rig.machines() == set()
    rig.server.start()
    assert api.get(sandbox).status == "paused"
    api.resume(sandbox)
    count, pid = _count(api, sandbox)
    assert eventually(lambda: _count(api, sandbox)[0] > count, within=20)
    assert _count(api, sandbox)[1] == pid
    assert _clock_error(api, sandbox) < _CLOCK_SEC
    ending()
    rig.server.start()
    assert api.get(sandbox).status == "running"
    assert _count(api, sandbox)[1] == pid
    _cycle(api, sandbox)
    assert _count(api, sandbox)[1] == pid


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/pause", [200, 409]),
        ("POST", "/resume", [200, 409]),
        ("DELETE", "", [204, 204]),
    ],
)
def test_one_of_two_operations_on_a_vm_wins(
    rig: Rig, api: Api, method: str, path: str, expected: list[int]
) -> None:
    sandbox = api.create().id
    if path == "/resume":
        api.pause(sandbox)
    with ThreadPoolExecutor(2) as pool:
        answers = list(
            pool.map(lambda _: api.request(method, f"/v1/sandboxes/{sandbox}{path}"), range(2))
        )
    assert sorted(answer.status_code for answer in answers) == expected
    status = {"/pause": "paused", "/resume": "running", "": "stopped"}[path]
    assert api.get(sandbox).status == status
    assert len(rig.stored_of(sandbox)) == (1 if status == "paused" else 0)
    if status == "running":
        assert api.output(sandbox, "echo here") == "here"
    api.delete(sandbox)
    assert rig.stored_of(sandbox) == set()


def test_a_resume_that_fails_leaves_the_sandbox_paused(new_rig: NewRig) -> None:
    """The guest cannot be reached for its first seconds after each resume."""
    rig, api = new_rig()
    sandbox = api.create().id
    api.output(sandbox, "echo before > /root/state; sync")
    mute = (
        "sleep 1; ip rule add pref 10 blackhole; echo muted >> /root/state; sync; "
        f"sleep {patience(10)}; ip rule del pref 10; sleep 9999"
    )
    started = api.exec_raw(sandbox, "setsid", "sh", "-c", mute, background=True)
    assert started.status_code == 202, started.text
    time.sleep(3)
    api.pause(sandbox)
    rig.server.stop()
    rig.server.set(WRENN_BOOT_TIMEOUT_SEC="0.2")
    rig.server.start()
    stored = rig.stored_of(sandbox)
    for _ in range(2):
        answer = api.request("POST", f"/v1/sandboxes/{sandbox}/resume")
        assert (answer.status_code, error_of(answer).code) == (502, "agent_error")
        assert str(rig.data_dir) not in answer.text
        assert api.get(sandbox).status == "paused"
        assert rig.stored_of(sandbox) == stored
        assert {each.with_name("disk").stat().st_gid for each in stored} == {0}
        assert rig.machines() == set()
        assert rig.run_directories() == set()
    assert rig.reasons_of(sandbox)[-1]
    rig.server.stop()
    rig.server.set(WRENN_BOOT_TIMEOUT_SEC="60")
    rig.server.start()
    assert api.resume(sandbox).status == "running"
    assert api.output(sandbox, "cat /root/state") == "before\nmuted"
    assert api.exec(sandbox, "pgrep", "-x", "sleep").exit_code == 0
    _cycle(api, sandbox)
    assert api.output(sandbox, "cat /root/state") == "before\nmuted"
