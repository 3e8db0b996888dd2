"""`ip`, `tc` and `nft`, fed through standard input: one process for many changes."""

import subprocess
from collections.abc import Sequence

import msgspec

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.patience import patience

TIMEOUT_SEC = 30.0
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


class InterfaceAddress(msgspec.Struct):
    """One address of an interface, as `ip -json address` prints it."""

    local: str = ""
    prefixlen: int = 32


class Interface(msgspec.Struct):
    ifname: str = ""
    addr_info: list[InterfaceAddress] = []


class Route(msgspec.Struct):
    """One route, as `ip -json route` prints it; `dst` may be the word "default"."""

    dst: str = ""
    dev: str = ""


def _run(argv: Sequence[str], text: str, what: str) -> bytes:
    try:
        done = subprocess.run(
            argv,
            input=text.encode(),
            capture_output=True,
            timeout=patience(TIMEOUT_SEC),
            env=ENVIRONMENT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostFailure(f"{what} failed", detail=str(error)) from error
    if done.returncode != 0:
        raise HostFailure(f"{what} failed", detail=done.stderr.decode("utf-8", "replace")[:2000])
    return done.stdout


def ip_batch(lines: Sequence[str], *, force: bool = False) -> None:
    """Apply the lines in order, in the calling thread's namespace.

    Stops at the first failure with `HostFailure`; with `force` goes on and reports none.
    """
    if not lines:
        return
    argv = ["ip", "-force", "-batch", "-"] if force else ["ip", "-batch", "-"]
    try:
        _run(argv, "\n".join(lines) + "\n", "a network change")
    except HostFailure:
        if not force:
            raise


def tc_batch(lines: Sequence[str]) -> None:
    """Change the queues of interfaces, in order, in the calling thread's namespace."""
    _run(["tc", "-batch", "-"], "\n".join(lines) + "\n", "a bandwidth limit")


def nft(rules: str) -> None:
    """Apply rules as one transaction, in the calling thread's namespace."""
    _run(["nft", "-f", "-"], rules, "a firewall change")


def interfaces() -> list[Interface]:
    """Every interface with its IPv4 addresses."""
    output = _run(["ip", "-json", "-4", "address", "show"], "", "reading addresses")
    return msgspec.json.decode(output or b"[]", type=list[Interface])


def routes() -> list[Route]:
    """The IPv4 routes of the main table."""
    output = _run(["ip", "-json", "-4", "route", "show"], "", "reading routes")
    return msgspec.json.decode(output or b"[]", type=list[Route])
