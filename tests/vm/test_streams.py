"""Commands that are followed, and terminals, in a real machine."""

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from support.vm.rig import Api, Sandbox
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.vm

Frame = dict[str, object]


@dataclass
class Peer:
    """A WebSocket; frames are JSON objects."""

    connection: ClientConnection

    def say(self, **message: object) -> None:
        self.connection.send(json.dumps(message))

    def hear(self) -> Frame:
        return cast("Frame", json.loads(self.connection.recv(timeout=patience(30))))

    def rest(self) -> Iterator[Frame]:
        """All frames up to the close."""
        try:
            while True:
                yield self.hear()
        except ConnectionClosed:
            return

    def until(self, text: str) -> None:
        """Read until the output holds `text`; terminals send pings for ever, so not for ever."""
        heard = ""
        deadline = time.monotonic() + patience(60)
        while text not in heard:
            frame = self.hear()
            assert frame["type"] not in ("exit", "error"), (frame, heard)
            assert time.monotonic() < deadline, heard
            heard += _text(frame)


def _text(frame: Frame) -> str:
    if frame["type"] == "output":
        return base64.b64decode(str(frame["data"])).decode("utf-8", "replace")
    return str(frame["data"]) if frame["type"] in ("stdout", "stderr") else ""


@contextmanager
def _talk(api: Api, sandbox: str, route: str) -> Iterator[Peer]:
    url = f"{api.server.url.replace('http', 'ws', 1)}/v1/sandboxes/{sandbox}/{route}"
    headers = {"X-API-Key": api.http.headers["X-API-Key"]}
    with connect(url, additional_headers=headers, proxy=None, max_size=None) as connection:
        yield Peer(connection)


def _background(api: Api, sandbox: str, script: str, tag: str) -> int:
    answer = api.exec_raw(sandbox, "sh", "-c", script, background=True, tag=tag)
    assert answer.status_code == 202, answer.text
    assert answer.json()["tag"] == tag
    return int(answer.json()["pid"])


def test_a_command_with_input(api: Api, sandbox: Sandbox) -> None:
    with _talk(api, sandbox.id, "exec/stream") as peer:
        script = "echo err >&2; while read line; do echo got $line; done; exit 3"
        peer.say(type="start", cmd="sh", args=["-c", script])
        assert peer.hear()["type"] == "start"
        peer.say(type="stdin", data="é 1\n")
        peer.until("got é 1\n")
        peer.say(type="stdin", data="2\n")
        peer.say(type="stdin_close")
        frames = list(peer.rest())
        assert "".join(map(_text, frames)).endswith("got 2\n")
        assert frames[-1] == {"type": "exit", "exit_code": 3}
        assert peer.connection.close_code == 1000


def test_following_a_file_until_it_is_stopped(api: Api, sandbox: Sandbox) -> None:
    api.output(sandbox.id, "echo first > log")
    with _talk(api, sandbox.id, "exec/stream") as peer:
        peer.say(type="start", cmd="tail", args=["-f", "log"])
        peer.until("first\n")
        api.output(sandbox.id, "echo second >> log")
        peer.until("second\n")
        peer.say(type="stop")
        assert list(peer.rest()) == [{"type": "exit", "exit_code": 143}]


def test_a_lost_connection_ends_the_command(api: Api, sandbox: Sandbox) -> None:
    with _talk(api, sandbox.id, "exec/stream") as peer:
        peer.say(type="start", cmd="sh", args=["-c", "echo up; sleep 4321 & sleep 4321"])
        peer.until("up")
    api.output(
        sandbox.id,
        "for _ in $(seq 100); do pgrep -f '^sleep 4321' || exit 0; sleep 0.1; done; exit 1",
    )


def test_much_output_of_a_vm_arrives_in_order(api: Api, sandbox: Sandbox) -> None:
    count = 1_000_000
    wanted = hashlib.sha256()
    for start in range(1, count + 1, 100_000):
        wanted.update("".join(f"{n}\n" for n in range(start, start + 100_000)).encode())
    given, size = hashlib.sha256(), 0
    with _talk(api, sandbox.id, "exec/stream") as peer:
        begin = time.monotonic()
        peer.say(type="start", cmd="seq", args=[str(count)])
        last: Frame = {}
        for frame in peer.rest():
            text = _text(frame).encode()
            given.update(text)
            size += len(text)
            last = frame
    print(f"{size / (1 << 20) / (time.monotonic() - begin):.0f} MiB/s of output")
    assert last == {"type": "exit", "exit_code": 0}
    assert size > 6_000_000
    assert given.digest() == wanted.digest()


def test_a_background_command(api: Api, sandbox: Sandbox) -> None:
    script = "echo before; until [ -e go ]; do sleep 0.1; done; echo after; exit 4"
    pid = _background(api, sandbox.id, script, "job")
    listed = api.request("GET", f"/v1/sandboxes/{sandbox.id}/processes").json()["processes"]
    assert {"pid": pid, "tag": "job", "cmd": "sh", "args": ["-c", script]} in listed
    with _talk(api, sandbox.id, f"processes/{pid}/stream") as peer:
        assert peer.hear() == {"type": "start", "pid": pid}
        peer.until("before\n")
        api.output(sandbox.id, "touch go")
        frames = list(peer.rest())
    assert [_text(frame) for frame in frames] == ["after\n", ""]
    assert frames[-1] == {"type": "exit", "exit_code": 4}


def test_signals_reach_processes_of_a_vm(api: Api, sandbox: Sandbox) -> None:
    url = f"/v1/sandboxes/{sandbox.id}/processes"
    for query, code in (("", 137), ("?signal=SIGTERM", 143)):
        pid = _background(api, sandbox.id, "echo up; sleep 1000", "sleeper")
        with _talk(api, sandbox.id, "processes/sleeper/stream") as peer:
            peer.until("up")
            assert api.request("DELETE", f"{url}/{pid}{query}").status_code == 204
            assert list(peer.rest()) == [{"type": "exit", "exit_code": code}]
        assert api.request("DELETE", f"{url}/sleeper").status_code == 404


def _type(peer: Peer, text: str) -> None:
    peer.say(type="input", data=base64.b64encode(text.encode()).decode())


def test_a_terminal_and_coming_back_to_it(api: Api, sandbox: Sandbox) -> None:
    with _talk(api, sandbox.id, "pty") as peer:
        peer.say(type="start", cols=101, rows=31, tag="shell")
        started = peer.hear()
        assert (started["type"], started["tag"]) == ("started", "shell")
        _type(peer, "stty -echo; stty size; whoami; V=kept\n")
        peer.until("31 101\r\nroot\r\n")
        _type(peer, "python3 -i\n")
        peer.until(">>> ")
        _type(peer, "print(6 * 7)\n")
        peer.until("42\r\n")
        # not time.sleep: a signal just before it would not end it
        _type(peer, "print('loop' + 'ing'); exec('while 1: pass')\n")
        peer.until("looping\r\n")
        _type(peer, "\x03")
        peer.until("KeyboardInterrupt")
        _type(peer, "exit()\n")
    with _talk(api, sandbox.id, "pty") as peer:
        peer.say(type="connect", tag="shell")
        assert peer.hear()["pid"] == started["pid"]
        peer.say(type="resize", cols=90, rows=20)
        _type(peer, "echo $V; stty size; exit 6\n")
        peer.until("kept\r\n20 90\r\n")
        assert list(peer.rest())[-1] == {"type": "exit", "exit_code": 6}


def test_the_metrics_of_a_sandbox(api: Api, sandbox: Sandbox) -> None:
    metrics = api.request("GET", f"/v1/sandboxes/{sandbox.id}/metrics").json()
    assert metrics["cpu_count"] == 1
    assert 300 << 20 < metrics["mem_total"] < 512 << 20
    assert 0 < metrics["disk_used"] < metrics["disk_total"]


def test_a_pause_ends_streams_and_not_commands(api: Api) -> None:
    sandbox = api.create()
    pid = _background(api, sandbox.id, "n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done", "n")
    with _talk(api, sandbox.id, "processes/n/stream") as peer:
        peer.until("3\n")
        assert api.request("POST", f"/v1/sandboxes/{sandbox.id}/pause").status_code == 200
        begin = time.monotonic()
        *_, last = peer.rest()
        assert time.monotonic() - begin < 5
        assert (last["type"], last["code"]) == ("error", "invalid_state")
    assert api.request("POST", f"/v1/sandboxes/{sandbox.id}/resume").status_code == 200
    with _talk(api, sandbox.id, "processes/n/stream") as peer:
        assert peer.hear() == {"type": "start", "pid": pid}
        peer.until("1\n")
    api.delete(sandbox.id)


def test_a_fork_bomb_does_not_take_the_sandbox_hostage(api: Api) -> None:
    sandbox = api.create()
    with _talk(api, sandbox.id, "exec/stream") as peer:
        peer.say(type="start", cmd="bash", args=["-c", "b() { b | b & }; echo up; b; sleep 1000"])
        peer.until("up")
        time.sleep(3)
        begin = time.monotonic()
        api.delete(sandbox.id)
        assert time.monotonic() - begin < 10
        *_, last = peer.rest()
        assert last["type"] == "error"
