"""`wrenn demo`: the whole product once, through the Python client as any program would use it."""

import contextlib
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from wrenn_sandbox.client import Client, ClientError, Sandbox
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory
from wrenn_sandbox.testing.leftovers import settled
from wrenn_sandbox.testing.server_process import ServerProcess

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
_EXEC_TIMEOUT_SEC = 120


def run() -> None:
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
        raise HostFailure("The demo left something behind", detail=", ".join(sorted(left)))
    report.say("done: nothing is left")


def _serve_and_tour(data_dir: Path, report: "_Report") -> None:
    server = ServerProcess(data_dir, data_dir / "server.log", {"WRENN_SIGNUP": "open"})
    try:
        with report.step("started the server"):
            server.start()
        with Client(server.url) as client:
            _tour(client, report)
        with report.step("stopped the server"):
            server.stop()
    except (_Unexpected, ClientError) as error:
        raise HostFailure(f"The demo failed: {error}", detail=server.tail()) from error
    finally:
        if server.running:
            server.purge()


def _tour(client: Client, report: "_Report") -> None:
    with report.step("signed up and created an API key"):
        _sign_up(client)
    with contextlib.ExitStack() as sandboxes:
        with report.step("created a sandbox"):
            first = sandboxes.enter_context(client.sandboxes.create("minimal"))
        with report.step("ran a Python program in it"):
            output = _run(first, "python3", "-c", _PROGRAM)
        report.quote(output)
        report.quote(f"(kernel of this host: {platform.release()})")
        if _EXPECTED not in output:
            raise _Unexpected("the program computed something else")
        with report.step("created a second sandbox"):
            second = sandboxes.enter_context(client.sandboxes.create("minimal"))
        identities = [_run(each, "sh", "-c", _IDENTITY).split() for each in (first, second)]
        for name, *both in zip(("boot id", "machine id", "host name"), *identities, strict=True):
            report.quote(f"{name}: {both[0]} and {both[1]}")
            if both[0] == both[1]:
                raise _Unexpected(f"both machines have the same {name}")
        with report.step("deleted both"):
            sandboxes.close()


def _sign_up(client: Client) -> None:
    client.signup("demo@example.com", secrets.token_urlsafe(16))
    key = client.api_keys.create("demo").key
    if key is None:
        raise _Unexpected("the server made a key and did not show it")
    client.use_key(key)


def _run(sandbox: Sandbox, cmd: str, *args: str) -> str:
    """Standard output of a command that must succeed."""
    return sandbox.exec(cmd, *args, timeout_sec=_EXEC_TIMEOUT_SEC).check().stdout


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
