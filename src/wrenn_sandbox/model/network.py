"""Which addresses and names a sandbox may reach. Guests have IPv4 only.

A policy is judged for each packet of both directions, in this order:

1. name servers: the configured resolvers, on the port of DNS, while `internet` is true or there are
   `names`;
2. what is closed to every sandbox (`closed_to_all`) stays closed;
3. `allow` opens, also what `deny` closes and while `internet` is false;
4. `deny` closes;
5. `internet` decides about the rest.

What 4 and 5 close of HTTP and HTTPS, on their usual ports, is judged by name then: `names` opens.
With `secrets` all HTTPS is judged by name first: a rule opens its name, and sets a header.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, collapse_addresses
from typing import Final, Self

import idna

from .secrets import HeaderRule, Injection, InvalidSecret, check_rules

MAX_RANGES: Final = 128
"""Entries of one list of a policy, ranges and names together."""
MAX_NAME: Final = 253

# IANA's special-purpose IPv4 registry, less the documentation ranges.
SPECIAL: Final = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "224.0.0.0/3",
        ),
    )
)
"""Closed to every sandbox."""

PRIVATE: Final = tuple(
    map(
        IPv4Network,
        ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16", "198.18.0.0/15"),
    )
)
"""Those of them in which an operator may let policies open something."""

_FORM: Final = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){3}(/[0-9]{1,2})?")
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_ANY: Final = "*."


class InvalidPolicy(ValueError):
    """A policy that cannot be; `str()` names the field and says what is wrong."""


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """What one sandbox may reach; the default is the internet and nothing else.

    `names` are in ASCII and lower case. `*.example.com` stands for every name below example.com.
    `injection` is what it takes to follow the rules `secrets`: without it their names are closed.
    """

    internet: bool = True
    allow: tuple[IPv4Network, ...] = ()
    deny: tuple[IPv4Network, ...] = ()
    names: tuple[str, ...] = ()
    secrets: tuple[HeaderRule, ...] = ()
    injection: Injection | None = field(default=None, repr=False)

    @property
    def by_name(self) -> bool:
        """Whether something is judged by name."""
        return bool(self.names or self.secrets)

    @classmethod
    def parse(
        cls,
        *,
        internet: bool,
        allow: Sequence[str],
        deny: Sequence[str],
        secrets: Sequence[HeaderRule] = (),
    ) -> Self:
        """The policy of these texts, each once; `allow` may hold names. Raises `InvalidPolicy`."""
        opened = [
            _name(f"allow.{number}", text) if _is_name(text) else _range(f"allow.{number}", text)
            for number, text in enumerate(_bounded("allow", allow))
        ]
        closed = [_range(f"deny.{n}", text) for n, text in enumerate(_bounded("deny", deny))]
        return cls(
            internet,
            tuple(dict.fromkeys(each for each in opened if not isinstance(each, str))),
            tuple(dict.fromkeys(closed)),
            tuple(dict.fromkeys(each for each in opened if isinstance(each, str))),
            _rules(secrets),
        )

    def require_open(self, closed: Iterable[IPv4Network]) -> None:
        """Raise `InvalidPolicy` when `allow` names what is closed to every sandbox."""
        ranges = tuple(closed)
        for number, wanted in enumerate(self.allow):
            if any(wanted.overlaps(each) for each in ranges):
                raise InvalidPolicy(
                    f"allow.{number}: {wanted} is or holds addresses that are closed to every "
                    "sandbox: private, link-local, special or the platform's own"
                )


def closed_to_all(
    slots: IPv4Network, allowable: Iterable[IPv4Network] = ()
) -> tuple[IPv4Network, ...]:
    """What no policy opens: special ranges without `allowable`, and the sandboxes' own, `slots`.

    Sorted, and none inside another.
    """
    left = list(SPECIAL)
    for hole in allowable:
        left = [part for each in left for part in _without(each, hole)]
    return tuple(collapse_addresses([*left, slots]))


def _without(network: IPv4Network, hole: IPv4Network) -> Iterable[IPv4Network]:
    if network.subnet_of(hole):
        return ()
    return network.address_exclude(hole) if hole.subnet_of(network) else (network,)


def _bounded(field: str, texts: Sequence[str]) -> Sequence[str]:
    if len(texts) > MAX_RANGES:
        raise InvalidPolicy(f"{field}: at most {MAX_RANGES} entries are possible")
    return texts


def _rules(secrets: Sequence[HeaderRule]) -> tuple[HeaderRule, ...]:
    rules = tuple(
        replace(rule, name=_name(f"secrets.{number}.name", rule.name))
        for number, rule in enumerate(secrets)
    )
    try:
        check_rules(rules)
    except InvalidSecret as error:
        raise InvalidPolicy(str(error)) from None
    return rules


def _is_name(text: str) -> bool:
    """Whether a text can only be meant as a name: a last label of digits is part of an address."""
    last = text.rpartition(".")[2]
    return ":" not in text and "/" not in text and any(map(str.isalpha, last))


def _name(field: str, text: str) -> str:
    """The name in ASCII and lower case."""
    below = text.removeprefix(_ANY)
    wildcard = _ANY if below != text else ""
    name = below.lower()
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode() if len(name) <= MAX_NAME else ""
        except idna.IDNAError:
            name = ""
    labels = name.split(".")
    if len(name) > MAX_NAME or not all(map(_LABEL.fullmatch, labels)) or labels[-1][:1].isdigit():
        raise InvalidPolicy(f"{field}: must be a name such as example.com or *.example.com")
    if len(labels) < 2:
        raise InvalidPolicy(f"{field}: a name has two parts at least, such as example.com")
    return wildcard + name


def _range(field: str, text: str) -> IPv4Network:
    if ":" in text:
        raise InvalidPolicy(f"{field}: sandboxes have IPv4 only; there is no IPv6 to open or close")
    if not _FORM.fullmatch(text):
        other = ", or a name such as example.com" if field.startswith("allow") else ""
        raise InvalidPolicy(
            f"{field}: must be an IPv4 range such as 203.0.113.0/24, or an address{other}"
        )
    try:
        network = IPv4Network(text, strict=False)
    except ValueError:
        raise InvalidPolicy(f"{field}: is not an IPv4 range or address") from None
    if "/" in text and text.partition("/")[0] != str(network.network_address):
        raise InvalidPolicy(f"{field}: has bits set behind its prefix; write {network}")
    return network
