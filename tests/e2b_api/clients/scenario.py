"""What a user of E2B's Python client does, for any version of it: prints one line per feature.

Run by the Python of an environment that has the client: `scenario.py TEMPLATE`. A line is JSON:
`feature`, and `outcome`: `works`, `absent` where this version has no such feature, or what failed.
"""

import inspect
import json
import os
import socket
import subprocess
import sys
import time
import traceback

import e2b
from e2b import Sandbox

TEMPLATE = sys.argv[1]
PATIENCE = float(os.environ["SCENARIO_PATIENCE"])
ROOT = {"user": "root"}  # clients before 2.1 act as `user`, whom not every template has

_getaddrinfo = socket.getaddrinfo


def _resolve(host, *args, **kwargs):
    """Names below localhost are this machine, as in browsers; not every C library knows."""
    name = host.decode() if isinstance(host, bytes) else host
    if name and name.endswith(".localhost"):
        name = "127.0.0.1"
    return _getaddrinfo(name, *args, **kwargs)


socket.getaddrinfo = _resolve


class Absent(Exception):
    """This version has no such feature."""


def have(thing, *names):
    """The first of these attributes that the client has."""
    for name in names:
        if hasattr(thing, name):
            return getattr(thing, name)
    raise Absent


def create(**options):
    if hasattr(Sandbox, "create"):
        return Sandbox.create(TEMPLATE, **options)
    return Sandbox(TEMPLATE, **options)


def items(listed):
    """All entries of a list, whether the client has pages or not."""
    if not hasattr(listed, "next_items"):
        return listed
    found = []
    while listed.has_next:
        found += listed.next_items()
    return found


def write(path, text):
    """Write a file as root; old clients have the user behind the text, without a name."""
    named = "user" in inspect.signature(sandbox.files.write).parameters
    sandbox.files.write(path, text, **ROOT) if named else sandbox.files.write(path, text, "root")


def expect(error, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error as caught:
        return caught
    raise AssertionError(f"no {error}")


def listing():
    query = have(e2b, "SandboxQuery")
    labels = {"scenario": "b c&\u00fc", "version": sandbox.sandbox_id}
    other = create(metadata=labels, timeout=120)
    try:
        assert [each.sandbox_id for each in items(Sandbox.list(query=query(metadata=labels)))] == [
            other.sandbox_id
        ]
        ids = {each.sandbox_id for each in items(Sandbox.list())}
        assert {sandbox.sandbox_id, other.sandbox_id} <= ids
        nothing = query(metadata={**labels, "scenario": "other"})
        assert items(Sandbox.list(query=nothing)) == []
    finally:
        other.kill()


def info():
    told = have(sandbox, "get_info")()
    assert told.sandbox_id == sandbox.sandbox_id
    assert told.metadata["m"] == "1"
    assert 200 < (told.end_at - told.started_at).total_seconds() < 400


def timeout():
    sandbox.set_timeout(500)
    told = have(sandbox, "get_info")()
    assert (told.end_at - told.started_at).total_seconds() > 450


def running():
    assert sandbox.is_running()


def run():
    seen = []
    result = sandbox.commands.run("echo out; echo err >&2", on_stdout=seen.append, **ROOT)
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 0), result
    assert "".join(seen) == "out\n"


def environment():
    result = sandbox.commands.run('echo "$A $B"', envs={"B": "2"}, **ROOT)
    assert result.stdout == "1 2\n", result


def exit_code():
    error = expect(have(e2b, "CommandExitException"), sandbox.commands.run, "exit 3", **ROOT)
    assert error.exit_code == 3


def command_timeout():
    # some versions have a time limit of their own, which may come first
    error = expect(Exception, sandbox.commands.run, "sleep 60", timeout=1, **ROOT)
    assert "time" in f"{type(error).__name__} {error}".lower(), error


def background():
    command = sandbox.commands.run("sleep 600", background=True, **ROOT)
    assert command.pid in {each.pid for each in sandbox.commands.list()}
    assert sandbox.commands.kill(command.pid)
    assert not sandbox.commands.kill(command.pid)


def stdin():
    options = {"stdin": True}
    try:
        command = sandbox.commands.run("head -n 1", background=True, **options, **ROOT)
    except TypeError:
        command = sandbox.commands.run("head -n 1", background=True, **ROOT)
    sandbox.commands.send_stdin(command.pid, "line\n")
    assert command.wait().stdout == "line\n"


def files():
    path = f"{home}/a directory/\u00fc.txt"
    write(path, "text")
    assert sandbox.files.read(path, **ROOT) == "text"
    assert bytes(sandbox.files.read(path, format="bytes", **ROOT)) == b"text"
    assert sandbox.files.exists(path, **ROOT)
    assert [each.name for each in sandbox.files.list(f"{home}/a directory", **ROOT)] == [
        "\u00fc.txt"
    ]
    sandbox.files.rename(path, f"{home}/b", **ROOT)
    assert not sandbox.files.exists(path, **ROOT)
    assert sandbox.files.make_dir(f"{home}/c", **ROOT)
    sandbox.files.remove(f"{home}/b", **ROOT)
    assert not sandbox.files.exists(f"{home}/b", **ROOT)


def watch():
    handle = sandbox.files.watch_dir(home, **ROOT)
    write(f"{home}/watched", "x")
    seen = []
    deadline = time.monotonic() + PATIENCE
    while not any(each.name == "watched" for each in seen):
        assert time.monotonic() < deadline, seen
        time.sleep(0.1)
        seen += handle.get_new_events()
    handle.stop()


def terminal():
    said = []
    pty = sandbox.pty.create(e2b.PtySize(rows=24, cols=80), **ROOT)
    sandbox.pty.send_stdin(pty.pid, b"echo $((6 * 7)); exit\n")
    pty.wait(on_pty=said.append)
    assert b"42\r\n" in b"".join(said)


def another_process():
    found = subprocess.run(
        [sys.executable, __file__, TEMPLATE, sandbox.sandbox_id],
        check=False,
        capture_output=True,
        text=True,
    )
    assert found.stdout == "from another process\n", found


def pause_and_connect():
    pause = have(sandbox, "pause", "beta_pause")
    write(f"{home}/kept", "kept")
    pause()
    assert not sandbox.is_running()
    again = have(Sandbox, "resume", "connect")(sandbox.sandbox_id, timeout=300)
    assert again.files.read(f"{home}/kept", **ROOT) == "kept"


def snapshot():
    made = have(sandbox, "create_snapshot")()
    assert made.snapshot_id in {each.snapshot_id for each in items(Sandbox.list_snapshots())}
    other = Sandbox.create(made.snapshot_id, timeout=120)
    assert other.kill()
    assert Sandbox.delete_snapshot(made.snapshot_id)
    assert not Sandbox.delete_snapshot(made.snapshot_id)


def fork():
    for each in have(sandbox, "fork")(count=2):
        assert each.kill()


def network():
    allowed = ["203.0.113.9", "example.com"]
    have(sandbox, "update_network")({"allow_out": allowed, "deny_out": ["0.0.0.0/0"]})
    expect(e2b.SandboxException, sandbox.update_network, {"allow_out": ["example"]})


def metrics():
    assert isinstance(have(sandbox, "get_metrics")(), list)


def errors():
    expect(e2b.NotFoundException, sandbox.files.read, f"{home}/missing", **ROOT)
    gone = "sb-aaaaaaaaaaaaaaaaaaaa"
    expect(Exception, lambda: Sandbox.connect(gone).commands.run("true", **ROOT))
    assert not Sandbox.kill(gone)
    options = {"template": "no-such-template"}
    expect(Exception, lambda: have(Sandbox, "create")(**options))


def kill():
    assert sandbox.kill() is not False  # clients before 2.0 say nothing
    assert Sandbox.kill(sandbox.sandbox_id) is False
    expect(Exception, sandbox.commands.run, "true", **ROOT)
    assert not sandbox.is_running()


FEATURES = {
    "create": lambda: None,
    "info": info,
    "list with filters": listing,
    "set a timeout": timeout,
    "is it running": running,
    "run a command": run,
    "environment": environment,
    "exit code": exit_code,
    "time limit of a command": command_timeout,
    "command in the background": background,
    "input": stdin,
    "files": files,
    "watch": watch,
    "terminal": terminal,
    "connect from another process": another_process,
    "pause and connect": pause_and_connect,
    "snapshot": snapshot,
    "fork": fork,
    "network rules": network,
    "metrics": metrics,
    "errors": errors,
    "kill": kill,
}

if len(sys.argv) > 2:
    print(
        Sandbox.connect(sys.argv[2]).commands.run("echo from another process", **ROOT).stdout,
        end="",
    )
    sys.exit()

sandbox = create(timeout=300, metadata={"m": "1"}, envs={"A": "1"})
home = f"scenario-{sandbox.sandbox_id}"
for name, feature in FEATURES.items():
    try:
        feature()
        outcome = "works"
    except Absent:
        outcome = "absent"
    except Exception:
        outcome = traceback.format_exc()
    print(json.dumps({"feature": name, "outcome": outcome}), flush=True)
