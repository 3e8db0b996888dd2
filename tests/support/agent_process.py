"""Runs the guest agent as an ordinary process and speaks to it with the standard library."""

from __future__ import annotations

import base64
import http.client
import json
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import quote

from wrenn_sandbox.patience import patience

MAIN = Path(__file__).parents[2] / "guest" / "agent" / "main.py"
Json = dict[str, object]
END_OF_STREAM = 0x02
PATIENCE = patience(20.0)


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Json:
        return cast(Json, json.loads(self.body))


@dataclass
class Ended:
    """All of a command's output and its `end` event."""

    stdout: bytes = b""
    stderr: bytes = b""
    pty: bytes = b""
    end: Json = field(default_factory=dict)
    error: Json | None = None
    pid: int = 0

    @property
    def exit_code(self) -> int:
        return cast(int, self.end["exitCode"])


def envelope(message: Json, flags: int = 0) -> bytes:
    payload = json.dumps(message).encode()
    return bytes([flags]) + len(payload).to_bytes(4, "big") + payload


def process_message(cmd: str, *args: str, **fields: object) -> Json:
    """A Start message; `envs`, `cwd` and `user` belong to the process, the rest to the message."""
    process: Json = {"cmd": cmd, "args": list(args)}
    for name in ("envs", "cwd", "user"):
        if name in fields:
            process[name] = fields.pop(name)
    return {"process": process, **fields}


def sub(message: Json, *names: str) -> Json:
    """A nested object."""
    for name in names:
        message = cast(Json, message[name])
    return message


class Stream:
    """The messages of one streaming call; `error` is known after the last."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._response = connection.getresponse()
        assert self._response.status == 200, (self._response.status, self._response.read())
        assert self._response.headers["Content-Type"] == "application/connect+json"
        self.error: Json | None = None
        self.finished = False

    def __iter__(self) -> Iterator[Json]:
        while (message := self.next()) is not None:
            yield message

    def next(self) -> Json | None:
        header = self._exactly(5)
        message = cast(Json, json.loads(self._exactly(int.from_bytes(header[1:], "big"))))
        if not header[0] & END_OF_STREAM:
            return message
        self.error = cast("Json | None", message.get("error"))
        assert self._response.read() == b"", "nothing follows the end of the stream"
        self.finished = True
        return None

    def started(self) -> int:
        message = self.next()
        assert message is not None, self.error
        return cast(int, sub(message, "event", "start")["pid"])

    def collect(self) -> Ended:
        """Everything up to the end."""
        result = Ended()
        parts: dict[str, list[bytes]] = {"stdout": [], "stderr": [], "pty": []}
        for message in self:
            event = sub(message, "event")
            assert not result.end, "nothing follows the end event"
            if "data" in event:
                for channel, text in sub(event, "data").items():
                    parts[channel].append(base64.b64decode(cast(str, text)))
            elif "end" in event:
                result.end = sub(event, "end")
            elif "start" in event:
                result.pid = cast(int, sub(event, "start")["pid"])
        result.stdout, result.stderr, result.pty = (b"".join(part) for part in parts.values())
        result.error = self.error
        return result

    def read_until(self, wanted: bytes) -> bytes:
        """Output of any channel until it contains `wanted`."""
        seen = b""
        while wanted not in seen:
            message = self.next()
            assert message is not None, (seen, self.error)
            event = sub(message, "event")
            assert "end" not in event, (seen, event)
            for text in sub(event, "data").values() if "data" in event else ():
                seen += base64.b64decode(cast(str, text))
        return seen

    def close(self) -> None:
        self._response.close()

    def _exactly(self, count: int) -> bytes:
        data = self._response.read(count)
        assert len(data) == count, "stream was cut off"
        return data


class Agent:
    """A running agent; `headers` are sent with every request.

    With `max_file_size` (bytes) writing more into a file fails as on a full disk.
    """

    def __init__(self, home: Path, max_file_size: int | None = None) -> None:
        self.home = home
        self.headers: dict[str, str] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(MAIN), "--port", "0", "--home", str(home)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        if max_file_size is not None:
            limit = (max_file_size, max_file_size)
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, limit)
        self.port = cast(int, json.loads(self.process.stdout.readline())["port"])

    def stop(self) -> str:
        """Stop it; returns what it wrote to the console, which should be nothing."""
        self.process.terminate()
        _, console = self.process.communicate(timeout=PATIENCE)
        return console.decode()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        with closing(self.connect()) as connection:
            connection.request(method, path, body, {**self.headers, **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, dict(response.headers.items()), response.read())

    def call(self, method: str, message: Json, headers: dict[str, str] | None = None) -> Reply:
        """A unary call, like `process.Process/List`."""
        body = json.dumps(message).encode()
        given = {"Content-Type": "application/json", "Connect-Protocol-Version": "1"}
        return self.request("POST", f"/{method}", body, given | (headers or {}))

    @contextmanager
    def stream(
        self, method: str, *messages: Json, headers: dict[str, str] | None = None
    ) -> Iterator[Stream]:
        given = {"Content-Type": "application/connect+json", "Connect-Protocol-Version": "1"}
        with closing(self.connect()) as connection:
            connection.request(
                "POST",
                f"/{method}",
                iter([envelope(message) for message in messages]),
                self.headers | given | (headers or {}),
                encode_chunked=True,
            )
            with closing(Stream(connection)) as stream:
                yield stream

    @contextmanager
    def start(self, cmd: str, *args: str, **fields: object) -> Iterator[Stream]:
        message = process_message(cmd, *args, **fields)
        with self.stream("process.Process/Start", message) as stream:
            yield stream

    def run(self, cmd: str, *args: str, **fields: object) -> Ended:
        """Run a command to its end, without stdin unless asked for."""
        fields.setdefault("stdin", False)
        with self.start(cmd, *args, **fields) as stream:
            return stream.collect()

    def pids(self) -> list[int]:
        reply = self.call("process.Process/List", {})
        processes = cast(list[Json], reply.json().get("processes", []))
        return [cast(int, process["pid"]) for process in processes]

    def files(self, path: str | bytes, **query: str) -> str:
        """The URL of a file."""
        extra = "".join(f"&{name}={quote(value, safe='')}" for name, value in query.items())
        return f"/files?path={quote(path, safe='')}{extra}"


def signal_group(agent: Agent, pid: int, name: str) -> int:
    """Status of a SendSignal call."""
    message: Json = {"process": {"pid": pid}, "signal": name}
    return agent.call("process.Process/SendSignal", message).status


def send_stdin(agent: Agent, pid: int, data: bytes) -> int:
    """Status of a SendInput call."""
    encoded = base64.b64encode(data).decode()
    message: Json = {"process": {"pid": pid}, "input": {"stdin": encoded}}
    return agent.call("process.Process/SendInput", message).status
