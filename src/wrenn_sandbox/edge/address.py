"""For which port of which sandbox a request is, if for any. Pure."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.wire.guest import AGENT_PORT

Headers = Iterable[tuple[bytes, bytes]]
"""Names in lower case."""

SANDBOX_HEADER: Final = b"e2b-sandbox-id"
PORT_HEADER: Final = b"e2b-sandbox-port"

_AGENT: Final = b"%d" % AGENT_PORT
_LABEL: Final = re.compile(r"([0-9]{1,5})-([a-z0-9-]{1,57})")
_CONTROL: Final = re.compile(rb"/(v2/)?sandboxes(/.*)?", re.DOTALL)
"""Calls about sandboxes: some clients send the headers of their agent with these too."""

_PATH: Final = re.compile(rb"/v1/(sandboxes|capsules)/[^/?#]+/ports/[^/?#]+/.*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Address:
    """A port of a sandbox as a request names it; neither has to exist.

    `own_origin`: nothing else is served under this host name.
    """

    sandbox_id: str
    port: int
    own_origin: bool


def port_of(text: str) -> int:
    """The number of a port; raises `InvalidRequest`."""
    if text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536:
        return int(text)
    raise InvalidRequest("The port must be a number from 1 to 65535")


def address_of(headers: Headers, domain: str, path: bytes = b"/") -> Address | None:
    """The port that the name of the host says, or else the headers; None where neither does.

    The host goes first: a page on one sandbox's origin gets no answer of another one. A call about
    sandboxes is none for the agent, which has no such path. Raises `InvalidRequest`.
    """
    fields = dict(headers)
    label = _label(fields.get(b"host", b""), domain)
    if label is not None:
        return Address(label[2], port_of(label[1]), own_origin=True)
    sandbox_id = fields.get(SANDBOX_HEADER)
    if sandbox_id is None:
        return None
    if _is_control(fields, path):
        return None
    port = fields.get(PORT_HEADER, _AGENT).decode("latin-1").strip()
    return Address(sandbox_id.decode("latin-1").strip(), port_of(port), own_origin=False)


def is_for_port(headers: Headers, target: bytes, domain: str) -> bool:
    """Whether a request with this target is for a port of a sandbox, by its path too."""
    fields = dict(headers)
    return (
        (SANDBOX_HEADER in fields and not _is_control(fields, target.partition(b"?")[0]))
        or _PATH.fullmatch(target) is not None
        or _label(fields.get(b"host", b""), domain) is not None
    )


def _is_control(fields: Mapping[bytes, bytes], path: bytes) -> bool:
    names_agent = fields.get(PORT_HEADER, _AGENT).strip() == _AGENT
    return names_agent and _CONTROL.fullmatch(path) is not None


def host_of(port: int | str, sandbox_id: str, domain: str) -> str:
    """The name under which a port has an origin of its own."""
    return f"{port}-{sandbox_id}.{domain}"


def _label(host: bytes, domain: str) -> re.Match[str] | None:
    name = host.decode("latin-1").lower().partition(":")[0].removesuffix(".")
    if not name.endswith("." + domain):
        return None
    return _LABEL.fullmatch(name[: -len(domain) - 1])
