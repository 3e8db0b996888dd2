"""The nftables rules of a slot and of the host, as text for `nft -f -`. Pure."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network

from wrenn_sandbox.host.network.addressing import AddressPlan
from wrenn_sandbox.host.network.slot import (
    AGENT_PORT,
    GATEWAY_IP,
    GUEST_IP,
    GUEST_MAC,
    TAP_NAME,
    UPLINK_NAME,
)

SLOT_TABLE = "wrenn"

# IANA's special-purpose IPv4 registry, less the documentation ranges.
DENIED = (
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
)


def slot_rules(network: IPv4Network, resolvers: Sequence[IPv4Address], *, internet: bool) -> str:
    """What holds in the namespace of a slot, whatever its guest sends.

    Destinations are judged after the redirection of DNS, so a private resolver is reached on port
    53 and nowhere else. Without `internet` the guest reaches nothing.
    """
    denied = _joined({*map(IPv4Network, DENIED), network})
    dns_redirect = ""
    outward = ""
    if internet:
        outward = f"""
        iifname "{TAP_NAME}" oifname "{UPLINK_NAME}" jump outward"""
        if resolvers:
            dns_redirect = f"""
        iifname "{TAP_NAME}" ip daddr {GATEWAY_IP} meta l4proto {{ tcp, udp }} \
th dport 53 dnat ip to {resolvers[0]}"""
    dns_accept = ""
    if resolvers:
        addresses = ", ".join(map(str, resolvers))
        dns_accept = f"""
        ip daddr {{ {addresses} }} meta l4proto {{ tcp, udp }} th dport 53 accept"""
    return f"""
table netdev {SLOT_TABLE} {{
    chain guest {{
        type filter hook ingress device "{TAP_NAME}" priority filter; policy drop;
        ether saddr {GUEST_MAC} ip saddr {GUEST_IP} accept
        ether saddr {GUEST_MAC} arp saddr ether {GUEST_MAC} arp saddr ip {GUEST_IP} accept
    }}
}}
table inet {SLOT_TABLE} {{
    chain dns_to_resolver {{
        type nat hook prerouting priority dstnat; policy accept;{dns_redirect}
    }}
    chain leaving {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {GUEST_IP} oifname "{UPLINK_NAME}" masquerade
    }}
    chain outward {{{dns_accept}
        meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} drop
        ip daddr {{ {denied} }} drop
        meta nfproto ipv4 accept
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ct state established,related accept{outward}
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        ct state established,related accept
    }}
    chain output {{
        type filter hook output priority filter; policy drop;
        ct state established,related accept
        oifname "{TAP_NAME}" ip daddr {GUEST_IP} tcp dport {AGENT_PORT} accept
    }}
}}
"""


def host_rules(plan: AddressPlan, resolvers: Sequence[IPv4Address]) -> str:
    """What holds in the host's own namespace: only packets of this server's veths are judged.

    Replaces an older table of the same name in one transaction.
    """
    ours = f'"{plan.veth_prefix}*"'
    dns = ""
    if resolvers:
        addresses = ", ".join(map(str, resolvers))
        dns = f"""
        iifname {ours} ip daddr {{ {addresses} }} meta l4proto {{ tcp, udp }} th dport 53 accept"""
    return f"""
table inet {plan.table}
delete table inet {plan.table}
table inet {plan.table} {{
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname != {ours} accept
        ct state established,related accept{dns}
        drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname {ours} oifname {ours} drop
        iifname {ours} ip saddr {plan.block} accept
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


def _joined(networks: set[IPv4Network]) -> str:
    """The networks without those inside another one: a set of intervals may not overlap."""
    outer = [
        network
        for network in networks
        if not any(network != other and network.subnet_of(other) for other in networks)
    ]
    return ", ".join(str(network) for network in sorted(outer))
