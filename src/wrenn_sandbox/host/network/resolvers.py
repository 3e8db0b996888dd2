"""Which name servers a guest's questions are sent to."""

from collections.abc import Sequence
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

from wrenn_sandbox.errors import HostFailure

RESOLV_CONF = Path("/etc/resolv.conf")
SYSTEMD_RESOLV_CONF = Path("/run/systemd/resolve/resolv.conf")


def _nameservers(path: Path) -> list[IPv4Address]:
    try:
        text = path.read_text("utf-8", "replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            found.append(IPv4Address(words[1]))
        except AddressValueError:
            continue  # an IPv6 server: guests have IPv4 only
    return found


def resolvers(
    configured: Sequence[str],
    resolv_conf: Path = RESOLV_CONF,
    systemd_resolv_conf: Path = SYSTEMD_RESOLV_CONF,
) -> tuple[IPv4Address, ...]:
    """The configured name servers, or else those of this machine; possibly none.

    A stub on the loopback address cannot be reached from a namespace: in its place come the
    servers behind it, which systemd-resolved lists in a file of its own.
    Raises `HostFailure` for a configured server that is not a usable IPv4 address.
    """
    if configured:
        return tuple(_configured(text) for text in configured)
    usable = [server for server in _nameservers(resolv_conf) if not server.is_loopback]
    if not usable:
        usable = [server for server in _nameservers(systemd_resolv_conf) if not server.is_loopback]
    return tuple(dict.fromkeys(usable))


def _configured(text: str) -> IPv4Address:
    try:
        server = IPv4Address(text)
    except AddressValueError:
        raise HostFailure(f"The name server {text!r} is not an IPv4 address") from None
    if server.is_loopback:
        raise HostFailure(f"The name server {text} is a loopback address: guests cannot reach it")
    return server
