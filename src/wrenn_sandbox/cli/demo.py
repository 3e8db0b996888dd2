"""`wrenn demo`: the whole product once, as any HTTP client would use it."""

import contextlib
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2
import msgspec
import typer

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.settings import Settings

from .child import ServerProcess
from .leftovers import settled
from .workdir import working_directory

_PROGRAM = """\
import os, platform
memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
sieve = bytearray([1]) * 2_000_000
sieve[:2] = b"\\0\\0"
for n in range(2, 1415):
    if sieve[n]:
        sieve[n * n :: n] = bytes(len(range(n * n, len(sieve), n)))
print("kernel:", platform.release())
print("memory:", memory, "MB")
print("sum of the primes below two million:", sum(n for n, prime in enumerate(sieve) if prime))
"""
_EXPECTED = "142913828922"
_IDENTITY = "cat /proc/sys/kernel/random/boot_id /etc/machine-id; hostname"
_REQUEST_TIMEOUT_SEC = 180.0


def command() -> None:
    """Build, start a server, run a program in a machine, clean up; every step with its time."""
    report = _Report(time.monotonic)
    settings = Settings()
    subprocess.run(
        [sys.executable, "-m", "wrenn_sandbox", "template", "build", "minimal"], check=True
    )
    report.say("the template is built")
    with working_directory(settings.data_dir, "demo") as data_dir:
        _serve_and_tour(data_dir, report)
        with report.step("looked for leftovers"):
            left = settled(data_dir=data_dir)
    if left:
        raise HostFailure("the demo left something behind", detail=", ".join(sorted(left)))
    report.say("done: nothing is left")


def _serve_and_tour(data_dir: Path, report: "_Report") -> None:
    server = ServerProcess(data_dir, data_dir / "server.log")
    try:
        with report.step("started the server"):
            server.start()
        with httpx2.Client(base_url=server.url, timeout=_REQUEST_TIMEOUT_SEC) as http:
            _tour(_Api(http), report)
        with report.step("stopped the server"):
            server.stop()
    except (_Unexpected, httpx2.HTTPError) as error:
        raise HostFailure(f"the demo failed: {error}", detail=server.tail()) from error
    finally:
        if server.running:
            server.purge()


def _tour(api: "_Api", report: "_Report") -> None:
    with report.step("signed up and created an API key"):
        api.sign_up()
    with api.cleaning_up():
        with report.step("created a sandbox"):
            first = api.create()
        with report.step("ran a Python program in it"):
            output = api.run(first, "python3", "-c", _PROGRAM)
        report.quote(output)
        report.quote(f"(kernel of this host: {platform.release()})")
        if _EXPECTED not in output:
            raise _Unexpected("the program computed something else")
        with report.step("created a second sandbox"):
            second = api.create()
        identities = [api.run(each, "sh", "-c", _IDENTITY).split() for each in (first, second)]
        for name, *both in zip(("boot id", "machine id", "host name"), *identities, strict=True):
            report.quote(f"{name}: {both[0]} and {both[1]}")
            if both[0] == both[1]:
                raise _Unexpected(f"both machines have the same {name}")
        with report.step("deleted both"):
            api.delete(first)
            api.delete(second)


class _Unexpected(Exception):
    """The API answered something else than it should."""


@dataclass(frozen=True)
class _Report:
    clock: Callable[[], float]

    def say(self, what: str) -> None:
        typer.echo(what)

    def quote(self, text: str) -> None:
        for line in text.splitlines():
            typer.echo(f"             | {line}")

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        begin = self.clock()
        yield
        typer.echo(f"{self.clock() - begin:10.3f} s {what}")


class _Token(msgspec.Struct):
    token: str


class _Key(msgspec.Struct):
    key: str


class _Sandbox(msgspec.Struct):
    id: str


class _Result(msgspec.Struct):
    exit_code: int
    stdout: str
    stderr: str


_Answer = TypeVar("_Answer")


class _Api:
    """The few calls the demo makes."""

    def __init__(self, http: httpx2.Client) -> None:
        self._http = http
        self._alive: list[str] = []

    def sign_up(self) -> None:
        account = {"email": "demo@example.com", "password": secrets.token_urlsafe(16)}
        token = self._call("POST", "/v1/auth/signup", _Token, account).token
        bearer = {"Authorization": f"Bearer {token}"}
        key = self._call("POST", "/v1/api-keys", _Key, {"name": "demo"}, bearer).key
        self._http.headers["X-API-Key"] = key

    def create(self) -> str:
        sandbox = self._call("POST", "/v1/sandboxes", _Sandbox, {"template": "minimal"}).id
        self._alive.append(sandbox)
        return sandbox

    def run(self, sandbox: str, cmd: str, *args: str) -> str:
        """Standard output of a command that must succeed."""
        body = {"cmd": cmd, "args": args, "timeout_sec": 120}
        result = self._call("POST", f"/v1/sandboxes/{sandbox}/exec", _Result, body)
        if result.exit_code != 0:
            raise _Unexpected(f"{cmd} ended with {result.exit_code}: {result.stderr}")
        return result.stdout

    def delete(self, sandbox: str) -> None:
        self._call("DELETE", f"/v1/sandboxes/{sandbox}", type(None))
        self._alive.remove(sandbox)

    @contextlib.contextmanager
    def cleaning_up(self) -> Iterator[None]:
        """Delete what is still there when the block ends early."""
        try:
            yield
        finally:
            for sandbox in self._alive:
                with contextlib.suppress(httpx2.HTTPError):
                    self._http.delete(f"/v1/sandboxes/{sandbox}")

    def _call(
        self,
        method: str,
        path: str,
        kind: type[_Answer],
        body: object = None,
        headers: dict[str, str] | None = None,
    ) -> _Answer:
        answer = self._http.request(method, path, json=body, headers=headers)
        if not answer.is_success:
            raise _Unexpected(f"{method} {path} answered {answer.status_code}: {answer.text}")
        return msgspec.json.decode(answer.content or b"null", type=kind)
