"""Which addresses the server calls because a user asked for it.

It stands where users do not: what it reaches on its own host and network is not theirs to see.
"""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

from .network import SPECIAL

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_CLOSED_V4: Final = (
    *SPECIAL,
    *map(
        IPv4Network,
        (
            "168.63.129.16/32",  # the host of an Azure VM, which believes what comes from there
            "192.0.2.0/24",
            "192.88.99.0/24",
            "198.51.100.0/24",
            "203.0.113.0/24",
        ),
    ),
)
_UNICAST_V6: Final = IPv6Network("2000::/3")
_CLOSED_V6: Final = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # Teredo among others, which leads to any IPv4 address
            "2001:db8::/32",
            "2002::/16",  # 6to4, likewise
            "3fff::/20",
        ),
    )
)


def may_be_called(address: Address, allowed: Sequence[Network]) -> bool:
    """Whether an address is public, or in one of the networks that the operator allows.

    An IPv4 address in the form of an IPv6 one never is.
    """
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return False
    return _is_public(address) or any(address in network for network in allowed)


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _CLOSED_V4)
    return address in _UNICAST_V6 and not any(address in network for network in _CLOSED_V6)
