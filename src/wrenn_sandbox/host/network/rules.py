"""The nftables rules of a slot and of the host, as text for `nft -f -`. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, collapse_addresses
from typing import Final

from wrenn_sandbox.host.egress.proxy import INSPECTED, LISTENING, MARK
from wrenn_sandbox.host.slot import (
    GATEWAY_IP,
    GUEST_IP,
    GUEST_MAC,
    PORT_MARK,
    TAP_NAME,
    UPLINK_NAME,
)
from wrenn_sandbox.model.network import NetworkPolicy
from wrenn_sandbox.wire.guest import AGENT_PORT

from .addressing import AddressPlan

SLOT_TABLE: Final = "wrenn"
BURST_SEC: Final = 5
"""A guest that was quiet may open the connections of so many seconds at once."""
_MIN_BURST_KB: Final = 128
"""Room for the biggest packet that the kernel hands on as one, 64 KB."""
_EVERYWHERE: Final = IPv4Network("0.0.0.0/0")
_DNS: Final = "meta l4proto { tcp, udp } th dport 53"
_ICMP_ERRORS: Final = "{ destination-unreachable, time-exceeded, parameter-problem }"
REFUSALS_PER_SEC: Final = 100
"""How many packets of one guest are answered with a refusal; the others are dropped."""
_REFUSALS: Final = f"limit rate {REFUSALS_PER_SEC}/second burst {REFUSALS_PER_SEC} packets"
_SETS: Final = ("resolvers", "allowed", "denied", "by_name", "inspected")
_FIRST_PACKET: Final = "ct state new ct status & confirmed == 0"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one guest may take of this machine's network; 0 is without limit.

    `connections` are open at once, `connections_per_sec` are new ones; `mbit_per_sec` is for each
    direction.
    """

    connections: int = 0
    connections_per_sec: int = 0
    mbit_per_sec: int = 0


@dataclass(frozen=True, slots=True)
class Ground:
    """What holds for every slot of a server.

    No policy opens what is `closed`; what is `allowable` is reached by those alone who allow it.
    """

    resolvers: tuple[IPv4Address, ...]
    closed: tuple[IPv4Network, ...]
    allowable: tuple[IPv4Network, ...] = ()
    limits: Limits = Limits()


def slot_rules(ground: Ground, policy: NetworkPolicy, *, internet: bool) -> str:
    """What holds in the namespace of a slot, whatever its guest sends.

    Replaces older tables in one transaction. Each packet is judged by its far end's address, also
    those of open connections: a change of the policy concerns them at once. What others report of a
    connection is judged by whom the connection is to. Destinations are judged after the redirection
    of DNS, so a private resolver is reached on port 53 and nowhere else. What a policy with names
    refuses of HTTP and HTTPS is redirected to the egress proxy, whose own calls bear a mark. All
    HTTPS that is not closed is, where it has rules for secrets.
    Without `internet` the guest reaches nothing.

    What is closed is refused, so that programs do not wait for it, in one way that tells nothing
    but the policy: the same message from the gateway, whatever is or is not at the address. That
    is why packets to the slot's own addresses are refused before they are routed: afterwards the
    kernel would answer from those. A message does not end a connection that is open: it goes on
    when a policy opens its destination again.
    """
    forward = f"""
        iifname "{TAP_NAME}" goto refused"""
    redirect = by_name = ""
    if internet:
        forward = f"""
        iifname "{TAP_NAME}" oifname "{UPLINK_NAME}" jump outward
        iifname "{UPLINK_NAME}" oifname "{TAP_NAME}" jump inward"""
        if ground.resolvers:
            redirect = f"""
        iifname "{TAP_NAME}" ip daddr {GATEWAY_IP} {_DNS} dnat ip to {ground.resolvers[0]}"""
        by_name = f"""
        iifname "{TAP_NAME}" tcp dport @by_name jump to_proxy"""
    closed = _listed(ground.closed)
    to_private = from_private = private_past = ""
    if ground.allowable:
        private = _listed(ground.allowable)
        to_private = f"""
        ip daddr {{ {private} }} goto refused"""
        from_private = f"""
        ct reply ip saddr {{ {private} }} drop"""
        private_past = f"""
        ip daddr {{ {private} }} ip daddr != @allowed return"""
    to_proxy = "\n        ".join(
        f"tcp dport {port} dnat ip to {GATEWAY_IP}:{here}" for port, here in LISTENING.items()
    )
    proxy_ports = ", ".join(map(str, LISTENING.values()))
    return f"""
table netdev {SLOT_TABLE}
delete table netdev {SLOT_TABLE}
table inet {SLOT_TABLE}
delete table inet {SLOT_TABLE}
table netdev {SLOT_TABLE} {{
    chain guest {{
        type filter hook ingress device "{TAP_NAME}" priority filter; policy drop;
        ether saddr {GUEST_MAC} ip hdrlength 5 ip saddr {GUEST_IP} accept
        ether saddr {GUEST_MAC} arp saddr ether {GUEST_MAC} arp saddr ip {GUEST_IP} accept
    }}
}}
table inet {SLOT_TABLE} {{
    set resolvers {{
        type ipv4_addr; flags interval
    }}
    set allowed {{
        type ipv4_addr; flags interval
    }}
    set denied {{
        type ipv4_addr; flags interval
    }}
    set by_name {{
        type inet_service
    }}
    set inspected {{
        type inet_service
    }}
    chain redirected {{
        type nat hook prerouting priority dstnat; policy accept;{redirect}{by_name}
    }}
    chain to_proxy {{
        ip daddr {{ {closed} }} return
        ip daddr @allowed tcp dport != @inspected return{private_past}
        tcp dport != @inspected ip daddr != @denied return
        {to_proxy}
    }}
    chain leaving {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {GUEST_IP} oifname "{UPLINK_NAME}" masquerade
    }}
    chain outward {{
        ip daddr @resolvers {_DNS} goto limited
        meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} goto refused
        ip daddr {{ {closed} }} goto refused
        ip daddr @allowed goto limited{to_private}
        ip daddr @denied goto refused
        meta nfproto ipv4 goto limited
    }}
    chain refused {{
        {_REFUSALS} reject with icmp type admin-prohibited
        drop
    }}
    chain limited {{
        ct state established,related accept{_limited(ground.limits, "")}
        ct state new accept
    }}
    chain inward {{
        ct state != {{ established, related }} drop
        ct state related icmp type != {_ICMP_ERRORS} drop
        ip saddr @resolvers meta l4proto {{ tcp, udp }} th sport 53 accept
        ct state related ct reply ip saddr @resolvers accept
        ct reply ip saddr {{ {closed} }} drop
        ct reply ip saddr @allowed accept{from_private}
        ct reply ip saddr @denied drop
        meta nfproto ipv4 accept
    }}
    chain to_slot {{
        type filter hook prerouting priority filter; policy accept;
        iifname != "{TAP_NAME}" accept
        ct state established,related accept
        ct status dnat ip daddr {GATEWAY_IP} tcp dport {{ {proxy_ports} }} accept
        fib daddr type local goto refused
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;{forward}
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        iifname "{TAP_NAME}" ct status dnat tcp dport {{ {proxy_ports} }} jump limited
    }}
    chain from_proxy {{
        ip daddr @resolvers {_DNS} goto limited
        ip daddr {{ {closed} }} goto refused
        tcp dport @by_name ip daddr @allowed goto limited{to_private}
        tcp dport @by_name goto limited
    }}
    chain output {{
        type filter hook output priority filter; policy drop;
        ct state established,related accept
        meta mark {MARK} goto from_proxy
        oifname "{TAP_NAME}" ip daddr {GUEST_IP} tcp dport {AGENT_PORT} accept
        oifname "{TAP_NAME}" ip daddr {GUEST_IP} meta l4proto tcp meta mark {PORT_MARK} accept
    }}
}}
{_elements(ground, policy)}"""


def policy_change(ground: Ground, policy: NetworkPolicy) -> str:
    """Another policy for a slot that has its rules; one transaction."""
    sets = "".join(f"flush set inet {SLOT_TABLE} {name}\n" for name in _SETS)
    return sets + _elements(ground, policy)


def _elements(ground: Ground, policy: NetworkPolicy) -> str:
    """Without `internet` everything is denied that is not allowed; names need resolvers too."""
    resolvers = ground.resolvers if policy.internet or policy.by_name else ()
    contents = (
        ", ".join(map(str, resolvers)),
        _listed(policy.allow),
        _listed(policy.deny if policy.internet else (_EVERYWHERE,)),
        ", ".join(map(str, LISTENING)) if policy.by_name else "",
        str(INSPECTED) if policy.secrets else "",
    )
    return "".join(
        f"add element inet {SLOT_TABLE} {name} {{ {elements} }}\n"
        for name, elements in zip(_SETS, contents, strict=True)
        if elements
    )


def _limited(limits: Limits, key: str) -> str:
    """Rules that drop the first packet of a connection too many.

    Whoever is closed by both sides is not counted. The rate bounds how fast closed ones, which the
    kernel remembers for two minutes, may follow each other.
    """
    rules = ""
    if limits.connections_per_sec:
        rate = limits.connections_per_sec
        over = f"limit rate over {rate}/second burst {BURST_SEC * rate} packets"
        rules += f"""
        {_FIRST_PACKET} {_for_each(key, "rates", over)} drop"""
    if limits.connections:
        over = f"ct count over {limits.connections}"
        rules += f"""
        {_FIRST_PACKET} {_for_each(key, "connections", over)} drop"""
    return rules


def limits_alone() -> str:
    """The rules that bound connections in a table of their own: to see whether this kernel can."""
    limits = Limits(connections=1, connections_per_sec=1)
    return f"""
table inet {SLOT_TABLE} {{
    set rates {{
        type ipv4_addr; size 1; flags dynamic
    }}
    set connections {{
        type ipv4_addr; size 1; flags dynamic
    }}
    chain slot {{{_limited(limits, "")}
    }}
    chain host {{{_limited(limits, "ip saddr")}
    }}
}}
"""


def shape_of(interface: str, mbit_per_sec: int) -> str:
    """A line for `tc` that bounds what is sent over an interface.

    What may pass at once is 10 ms' worth, what has to wait is kept for 100 ms.
    """
    burst_kb = max(_MIN_BURST_KB, mbit_per_sec * 10 // 8)
    rate = f"rate {mbit_per_sec}mbit burst {burst_kb}kb latency 100ms"
    return f"qdisc replace dev {interface} root tbf {rate}"


def _for_each(key: str, name: str, condition: str) -> str:
    return f"add @{name} {{ {key} {condition} }}" if key else condition


def host_rules(plan: AddressPlan, ground: Ground) -> str:
    """What holds in the host's own namespace: only packets of this server's veths are judged.

    Replaces an older table of the same name in one transaction. Limits are kept here again, for
    each slot by its address: a guest can make the slot's kernel forget what the host's remembers.
    """
    ours = f'"{plan.veth_prefix}*"'
    dns_here = dns_there = ""
    if ground.resolvers:
        addresses = f"ip daddr {{ {', '.join(map(str, ground.resolvers))} }} {_DNS}"
        dns_here = f"""
        iifname {ours} {addresses} jump limited"""
        dns_there = f"""
        {addresses} goto limited"""
    return f"""
table inet {plan.table}
delete table inet {plan.table}
table inet {plan.table} {{
    set rates {{
        type ipv4_addr; size {plan.capacity}; flags dynamic
    }}
    set connections {{
        type ipv4_addr; size {plan.capacity}; flags dynamic
    }}
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname != {ours} accept
        ct state established,related accept{dns_here}
        drop
    }}
    chain outward {{
        oifname {ours} drop
        ip saddr != {plan.block} drop{dns_there}
        ip daddr {{ {_listed(ground.closed)} }} drop
        meta nfproto ipv4 goto limited
        drop
    }}
    chain limited {{
        ct state established,related accept{_limited(ground.limits, "ip saddr")}
        ct state new accept
        drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname {ours} jump outward
        iifname {ours} drop
        oifname {ours} ct state established,related accept
        oifname {ours} drop
    }}
    chain leaving {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {plan.block} oifname != {ours} masquerade
    }}
}}
"""


def _listed(networks: Iterable[IPv4Network]) -> str:
    """Without those inside another one: a set of intervals may not overlap."""
    return ", ".join(map(str, collapse_addresses(networks)))
