"""An ordinary HTTP client of a real server, and the ways to look behind its back."""

import contextlib
import itertools
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httpx2
import msgspec

from wrenn_sandbox.host.journal import Record, records
from wrenn_sandbox.model.limits import EXEC_TIMEOUT_DEFAULT, EXEC_TIMEOUT_MAX
from wrenn_sandbox.patience import patience
from wrenn_sandbox.testing.data_dir import working_directory
from wrenn_sandbox.testing.leftovers import machines, settled
from wrenn_sandbox.testing.server_process import ServerProcess

_numbers = itertools.count(1)


class Sandbox(msgspec.Struct):
    """What the API says of a sandbox."""

    id: str
    status: str
    template: str
    vcpus: int
    memory_mb: int
    guest_ip: str | None = None
    host_ip: str | None = None


class Result(msgspec.Struct):
    """What the API says of a command that has ended."""

    sandbox_id: str
    cmd: str
    exit_code: int
    stdout: str
    stderr: str
    duration_ms: int
    encoding: str
    truncated: bool = False


class Error(msgspec.Struct):
    """What the API says of a failure."""

    code: str
    message: str
    stdout: str = ""
    stderr: str = ""


class _Envelope(msgspec.Struct):
    error: Error


@dataclass
class Api:
    """One team's view of one server. Deletes what it created when asked to."""

    server: ServerProcess
    http: httpx2.Client = field(init=False)
    created: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.http = httpx2.Client(timeout=patience(180))
        account = {"email": f"vm{next(_numbers)}@example.com", "password": "correct horse"}
        token = self.request("POST", "/v1/auth/signup", account).json()["token"]
        headers = {"Authorization": f"Bearer {token}"}
        answer = self.request("POST", "/v1/api-keys", {"name": "tests"}, headers=headers)
        self.http.headers["X-API-Key"] = answer.json()["key"]

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: dict[str, str] | None = None,
    ) -> httpx2.Response:
        return self.http.request(method, self.server.url + path, json=body, headers=headers)

    def create(self, **fields: object) -> Sandbox:
        answer = self.request("POST", "/v1/sandboxes", fields)
        assert answer.status_code == 201, f"{answer.text}\n{self.server.tail()}"
        sandbox = msgspec.json.decode(answer.content, type=Sandbox)
        self.created.append(sandbox.id)
        return sandbox

    def get(self, sandbox: str) -> Sandbox:
        answer = self.request("GET", f"/v1/sandboxes/{sandbox}")
        assert answer.status_code == 200, answer.text
        return msgspec.json.decode(answer.content, type=Sandbox)

    def exec_raw(self, sandbox: str, cmd: str, *args: str, **fields: object) -> httpx2.Response:
        body = {"cmd": cmd, "args": list(args), **fields}
        return self.request("POST", f"/v1/sandboxes/{sandbox}/exec", body)

    def exec(
        self,
        sandbox: str,
        cmd: str,
        *args: str,
        timeout_sec: int = EXEC_TIMEOUT_DEFAULT,
        **fields: object,
    ) -> Result:
        """What became of a command that ends in time, of which there is more on a slow host."""
        limit = min(round(patience(timeout_sec)), EXEC_TIMEOUT_MAX)
        answer = self.exec_raw(sandbox, cmd, *args, timeout_sec=limit, **fields)
        assert answer.status_code == 200, answer.text
        return msgspec.json.decode(answer.content, type=Result)

    def output(self, sandbox: str, script: str) -> str:
        """Standard output of a shell script that must succeed, stripped."""
        result = self.exec(sandbox, "sh", "-c", script)
        assert result.exit_code == 0, result
        return result.stdout.strip()

    def agent_status(self, sandbox: str, token: str) -> str:
        """The HTTP status of what the sandbox's agent answers to a caller with this token."""
        return self.output(
            sandbox,
            f"curl -s -o /dev/null -w '%{{http_code}}' -H 'X-Access-Token: {token}' "
            "'http://127.0.0.1:49983/files?path=/etc/hostname'",
        )

    def pause(self, sandbox: str) -> Sandbox:
        return self._change(sandbox, "pause")

    def resume(self, sandbox: str) -> Sandbox:
        return self._change(sandbox, "resume")

    def _change(self, sandbox: str, verb: str) -> Sandbox:
        answer = self.request("POST", f"/v1/sandboxes/{sandbox}/{verb}")
        assert answer.status_code == 200, f"{answer.text}\n{self.server.tail()}"
        return msgspec.json.decode(answer.content, type=Sandbox)

    def snapshot(self, sandbox: str, name: str, *, overwrite: bool = False) -> None:
        """Make a template of a sandbox, which is gone then."""
        query = "?overwrite=true" if overwrite else ""
        body = {"sandbox_id": sandbox, "name": name}
        answer = self.request("POST", f"/v1/snapshots{query}", body)
        assert answer.status_code == 201, f"{answer.text}\n{self.server.tail()}"

    def templates(self) -> list[str]:
        """Names of the team's own templates, sorted."""
        found = self.request("GET", "/v1/snapshots?type=snapshot").json()
        return sorted(each["name"] for each in found)

    def delete(self, sandbox: str) -> None:
        answer = self.request("DELETE", f"/v1/sandboxes/{sandbox}")
        assert answer.status_code == 204, answer.text
        if sandbox in self.created:
            self.created.remove(sandbox)

    def close(self) -> None:
        """Delete every sandbox that is still there."""
        for sandbox in list(self.created):
            self.delete(sandbox)
        self.http.close()


def error_of(answer: httpx2.Response) -> Error:
    """The error object of an answer that is one."""
    return msgspec.json.decode(answer.content, type=_Envelope).error


@dataclass(frozen=True)
class Rig:
    """A running server and what it has on this machine."""

    server: ServerProcess
    data_dir: Path

    def machines(self) -> set[int]:
        """Process ids of the machines of this server."""
        return machines(self.data_dir)

    def machine_of(self, sandbox: str) -> int:
        """Process id of one sandbox's machine."""
        found = [each for each in self.journals() if each.sandbox_id == sandbox]
        assert len(found) == 1, found
        assert found[0].process is not None
        assert found[0].process.pid in self.machines()
        return found[0].process.pid

    def namespace_of(self, pid: int) -> Path | None:
        """The named network namespace of a process; none with user-mode networking."""
        wanted = os.stat(f"/proc/{pid}/ns/net").st_ino
        for each in Path("/run/netns").glob("wrenn-*"):
            if each.stat().st_ino == wanted:
                return each
        return None

    def token_of(self, sandbox: str) -> str:
        """What the agent in a running sandbox expects of its callers."""
        [token] = [each.token for each in self.journals() if each.sandbox_id == sandbox]
        return token

    def stored_of(self, sandbox: str) -> set[Path]:
        """The manifests of what is stored of a sandbox and can be resumed."""
        return set((self.data_dir / "paused" / sandbox).glob("*/manifest.json"))

    def images(self) -> set[str]:
        """Everything in the directory of images, finished or not."""
        return {each.name for each in (self.data_dir / "images").iterdir()}

    def sealed_images(self) -> set[str]:
        """The images of whose memory the server keeps a sealed copy."""
        links = (each for each in Path(f"/proc/{self.server.pid}/fd").iterdir())
        found = set()
        for link in links:
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(link)
                if target.startswith("/memfd:wrenn-"):
                    found.add(target.removeprefix("/memfd:wrenn-").removesuffix(" (deleted)"))
        return found

    def reasons_of(self, sandbox: str) -> list[str]:
        """The reasons in a sandbox's event log, oldest first."""
        with contextlib.closing(sqlite3.connect(self.data_dir / "wrenn.db")) as database:
            rows = database.execute(
                "SELECT reason FROM sandbox_events WHERE sandbox_id = ? ORDER BY number", (sandbox,)
            )
            return [reason or "" for (reason,) in rows]

    def run_directories(self) -> set[str]:
        """Ids of the sandboxes whose machines have files of their own, and of other machines."""
        return {each.sandbox_id or each.machine_id for each in self.journals()}

    def journals(self) -> list[Record]:
        """What the server has written down of its machines."""
        return records(self.data_dir / "run")


def eventually(condition: Callable[[], bool], within: float) -> bool:
    """Whether the condition becomes true in time; for what another process does.

    `within` is in seconds, on a machine of usual speed.
    """
    deadline = time.monotonic() + patience(within)
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _arguments(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        return ""


def is_alive(pid: int) -> bool:
    """Whether a process of this id exists and is no zombie."""
    return bool(_arguments(pid))


class NewRig(Protocol):
    """Starts a server with these environment variables, and a team of it."""

    def __call__(self, **overrides: str) -> tuple[Rig, Api]: ...


@contextlib.contextmanager
def rig_of(images: Path, overrides: Mapping[str, str]) -> Iterator[Rig]:
    """A server of its own, of which nothing may be left in the end; it keeps no machines ready."""
    with working_directory(images, "test") as data_dir:
        variables = {"WRENN_HOT_POOL_SIZE": "0", **overrides}
        rig = Rig(ServerProcess(data_dir, data_dir / "server.log", variables), data_dir)
        try:
            with rig.server:
                yield rig
            left = settled(data_dir=data_dir)
        finally:
            rig.server.purge()
        assert left == set()
