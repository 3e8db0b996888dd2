"""Secrets of a team, and the headers by which the requests of a sandbox bear them.

A rule says that requests by HTTPS to a host have a header whose value holds a secret. The host's
egress proxy sets it: the value is never in the guest.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

PER_TEAM: Final = 100
HEADERS: Final = 16
"""Rules of one policy."""
NAME_LENGTH: Final = 64
VALUE_LENGTH: Final = 4096
TEMPLATE_LENGTH: Final = 256
HEADER_LENGTH: Final = 128

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TEXT: Final = re.compile(r"[!-~]([ -~]*[!-~])?")
_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_REFERENCE: Final = re.compile(r"\{\{secret:([^{}]*)\}\}")
_OF_CONNECTIONS: Final = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


class InvalidSecret(ValueError):
    """A secret or rule that cannot be; `str()` says what is wrong, without any value."""


@dataclass(frozen=True, slots=True)
class HeaderRule:
    """Requests by HTTPS to the host `name` have this header.

    `value` refers to a secret by its name, such as `Bearer {{secret:openai}}`. `*.example.com`
    stands for the names with one more label: a certificate can say no more.
    """

    name: str
    header: str
    value: str

    @property
    def secret(self) -> str:
        """The name of the secret that it refers to."""
        found = _REFERENCE.search(self.value)
        assert found is not None
        return found[1]

    def filled(self, secret: str) -> str:
        """The value of the header."""
        return _REFERENCE.sub(lambda _: secret, self.value)


@dataclass(frozen=True, slots=True)
class Injection:
    """What the egress proxy needs to follow the rules of one sandbox.

    `headers` are names of hosts, names of headers and their values. The proxy answers with the
    `certificate` in place of the hosts, and its `key`; the sandbox alone trusts its issuer, `ca`.
    All three are PEM. `version` is another one whenever something else is.
    """

    version: str
    ca: str = field(repr=False)
    certificate: str = field(repr=False)
    key: str = field(repr=False)
    headers: tuple[tuple[str, str, str], ...] = field(repr=False)


def is_name(name: str) -> bool:
    """Whether a secret may have that name."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Raise `InvalidSecret` for what cannot be the name of a secret."""
    if not is_name(name):
        raise InvalidSecret(
            f"must be 1 to {NAME_LENGTH} letters, digits, '_' or '-', and begin with a letter or"
            " digit"
        )


def check_value(value: str) -> None:
    """Raise `InvalidSecret` for what cannot be part of a header."""
    if len(value) > VALUE_LENGTH or not _TEXT.fullmatch(value):
        raise InvalidSecret(
            f"must be 1 to {VALUE_LENGTH} printable ASCII characters on one line, without a space"
            " at the beginning or end"
        )


def check_rules(rules: Iterable[HeaderRule]) -> None:
    """Check all but the names of hosts; raises `InvalidSecret`, which begins with the place."""
    known = set()
    for number, rule in enumerate(rules):
        if number >= HEADERS:
            raise InvalidSecret(f"secrets: at most {HEADERS} are possible")
        try:
            _check_rule(rule)
        except InvalidSecret as error:
            raise InvalidSecret(f"secrets.{number}.{error}") from None
        place = rule.name, rule.header.lower()
        if place in known:
            raise InvalidSecret(f"secrets.{number}.header: {rule.name} has this header already")
        known.add(place)


def _check_rule(rule: HeaderRule) -> None:
    header = rule.header.lower()
    if len(header) > HEADER_LENGTH or not _TOKEN.fullmatch(header):
        raise InvalidSecret("header: must be the name of a header, such as Authorization")
    if header in _OF_CONNECTIONS or header.startswith("sec-websocket-"):
        raise InvalidSecret("header: is part of the connection and cannot be set")
    if len(rule.value) > TEMPLATE_LENGTH or not _TEXT.fullmatch(rule.value):
        raise InvalidSecret(
            f"value: must be at most {TEMPLATE_LENGTH} printable ASCII characters on one line"
        )
    references = _REFERENCE.findall(rule.value)
    if len(references) != 1 or not _NAME.fullmatch(references[0]):
        raise InvalidSecret(
            "value: must refer to one secret by its name, such as Bearer {{secret:openai}}"
        )
