"""Makes and removes the slots of one server on the machine. Blocking: call it in a thread."""

import os
import socket
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import structlog

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.privileged import commands
from wrenn_sandbox.host.privileged.conntrack import forget_connections
from wrenn_sandbox.host.privileged.netns import NETNS_DIR, NamespaceThread
from wrenn_sandbox.host.privileged.process import kill_now, processes_in_netns
from wrenn_sandbox.host.slot import (
    GATEWAY_IP,
    GUEST_IP,
    GUEST_MAC,
    GUEST_PREFIX_LENGTH,
    TAP_MAC,
    TAP_NAME,
    UPLINK_NAME,
    Traffic,
)
from wrenn_sandbox.model.network import NetworkPolicy

from .addressing import (
    AddressPlan,
    index_of,
    netns_prefix,
    veth_prefix,
)
from .rules import (
    Ground,
    host_rules,
    policy_change,
    shape_of,
    slot_rules,
)

_log = structlog.get_logger(__name__)
SYSCTL = Path("/proc/sys/net")
_LIMITED_ICMP = str(1 << 4 | 1 << 11 | 1 << 12)
"""What the kernel limits by itself: as it would, but for unreachable destinations. The rules limit
those, and the kernel's limit is one for all slots and the host together."""


def leftovers(tag: str) -> set[int]:
    """The slots of which anything exists on this machine."""
    found: set[int | None] = set()
    with suppress(FileNotFoundError):
        found.update(index_of(name, netns_prefix(tag)) for name in os.listdir(NETNS_DIR))
    found.update(index_of(name, veth_prefix(tag)) for _, name in socket.if_nameindex())
    return {index for index in found if index is not None}


def traffic(tag: str) -> dict[int, Traffic]:
    """What went through the slots since they were made; raises OSError.

    What the host's end of a slot receives, its guest has sent.
    """
    found = {}
    for line in Path("/proc/net/dev").read_text("ascii").splitlines()[2:]:
        name, _, counters = line.partition(":")
        index = index_of(name.strip(), veth_prefix(tag))
        if index is not None:
            fields = counters.split()
            found[index] = Traffic(received=int(fields[8]), sent=int(fields[0]))
    return found


def networks_in_use(tag: str, network: IPv4Network) -> list[IPv4Network]:
    """What others than this server have in or around the range: addresses and narrower routes."""
    prefix = veth_prefix(tag)
    used = [
        IPv4Network(f"{address.local}/{address.prefixlen}", strict=False)
        for interface in commands.interfaces()
        if not interface.ifname.startswith(prefix)
        for address in interface.addr_info
        if address.local
    ]
    for route in commands.routes():
        if route.dst and route.dst != "default" and not route.dev.startswith(prefix):
            target = IPv4Network(route.dst, strict=False)
            if target.subnet_of(network):
                used.append(target)
    return [item for item in used if item.overlaps(network)]


def block_of_leftovers(tag: str, candidates: Iterable[IPv4Network]) -> IPv4Network | None:
    """The block that the addresses of existing veths of this server lie in."""
    blocks = list(candidates)
    prefix = veth_prefix(tag)
    for interface in commands.interfaces():
        if not interface.ifname.startswith(prefix):
            continue
        for address in interface.addr_info:
            for block in blocks:
                if address.local and IPv4Address(address.local) in block:
                    return block
    return None


class SlotBuilder:
    """Namespaces, veth pairs, taps and rules of one address plan."""

    def __init__(
        self,
        plan: AddressPlan,
        ground: Ground,
        thread: NamespaceThread,
        policies: NamespaceThread,
    ) -> None:
        """Policies are set in a thread of their own: they do not wait for slots being made."""
        self._plan = plan
        self._ground = ground
        self._thread = thread
        self._policies = policies
        self.internet = False

    def connect_host(self) -> str:
        """Set the host's rules and forwarding; why guests have no internet then, if anything."""
        try:
            commands.nft(host_rules(self._plan, self._ground))
            _enable_forwarding(_uplinks())
        except HostFailure as error:
            self.internet = False
            return error.detail or error.message
        self.internet = True
        return ""

    def disconnect_host(self) -> None:
        """Remove the host's rules, also when there are none."""
        table = self._plan.table
        with suppress(HostFailure):
            commands.nft(f"table inet {table}\ndelete table inet {table}\n")

    async def make(self, indices: Sequence[int]) -> None:
        """Make these slots, all or none. Raises `HostFailure`."""
        await self._thread.run(None, lambda: self._make_pairs(indices))
        try:
            for index in indices:
                await self._thread.run(self._plan.netns(index), partial(self._furnish, index))
        except BaseException:
            await self._thread.run(None, lambda: self._remove(indices))
            raise

    async def keep(self, index: int, policy: NetworkPolicy) -> None:
        """Give an older server's slot, which is in use, the rules of this one. `HostFailure`."""
        await self._thread.run(None, lambda: self._connect([index]))
        await self.open(index, policy, None)

    async def open(self, index: int, policy: NetworkPolicy, before: NetworkPolicy | None) -> None:
        """Let a slot's guest reach what the policy says, in place of the policy `before`.

        Without `before`, whatever rules there are get replaced. Raises `HostFailure`.
        """
        work = partial(self._open, policy, before)
        await self._policies.run(self._plan.netns(index), work)

    async def remove(self, indices: Collection[int]) -> None:
        """Remove whatever exists of these slots, with the processes left inside.

        Raises `HostFailure` when something stays.
        """
        await self._thread.run(None, lambda: self._remove(indices))

    def _make_pairs(self, indices: Sequence[int]) -> None:
        plan = self._plan
        lines = []
        for index in indices:
            veth, netns = plan.veth(index), plan.netns(index)
            lines += [
                f"netns add {netns}",
                f"link add {veth} type veth peer name {UPLINK_NAME} netns {netns}",
                f"link set {veth} addrgenmode none",
                f"addr add {plan.host_end(index)}/31 dev {veth}",
                f"link set {veth} up",
            ]
        try:
            commands.ip_batch(lines)
            self._connect(indices)
        except BaseException:
            self._remove(indices)
            raise

    def _connect(self, indices: Sequence[int]) -> None:
        """The host's side of slots."""
        names = [self._plan.veth(index) for index in indices]
        if self.internet:
            _enable_forwarding(names)
        self._shape(names)

    def _shape(self, names: Sequence[str]) -> None:
        """Bound what is sent over these interfaces."""
        rate = self._ground.limits.mbit_per_sec
        if rate:
            commands.tc_batch([shape_of(name, rate) for name in names])

    def _open(self, policy: NetworkPolicy, before: NetworkPolicy | None) -> None:
        """Runs inside the namespace of the slot."""
        if before is None:
            self._set_rules(policy)
        elif before != policy:
            commands.nft(policy_change(self._ground, policy))
        _write_sysctl("ipv4/ip_forward", "1")

    def _furnish(self, index: int) -> None:
        """Runs inside the namespace of the slot. Nothing is forwarded until it is opened."""
        plan = self._plan
        for interface in ("all", "default"):
            _write_sysctl(f"ipv6/conf/{interface}/disable_ipv6", "1", required=False)
        for interface in ("all", "default", UPLINK_NAME):
            _write_sysctl(f"ipv4/conf/{interface}/forwarding", "0")
        commands.ip_batch(
            [
                "link set lo up",
                f"tuntap add dev {TAP_NAME} mode tap vnet_hdr",
                f"link set {TAP_NAME} address {TAP_MAC}",
                f"addr add {GATEWAY_IP}/{GUEST_PREFIX_LENGTH} dev {TAP_NAME}",
                f"neigh replace {GUEST_IP} lladdr {GUEST_MAC} dev {TAP_NAME} nud permanent",
                f"addr add {plan.slot_end(index)}/31 dev {UPLINK_NAME}",
                f"link set {UPLINK_NAME} up",
                f"route add default via {plan.host_end(index)}",
            ]
        )
        self._set_rules(NetworkPolicy())

    def _set_rules(self, policy: NetworkPolicy) -> None:
        """Runs inside the namespace of the slot."""
        _write_sysctl("ipv4/icmp_ratemask", _LIMITED_ICMP)
        self._shape([UPLINK_NAME])
        commands.nft(slot_rules(self._ground, policy, internet=self.internet))

    def _remove(self, indices: Collection[int]) -> None:
        plan = self._plan
        for index in indices:
            _end_processes_of(plan.netns(index))
        commands.ip_batch(
            [
                *(f"link set {plan.veth(index)} group {plan.group}" for index in indices),
                f"link del group {plan.group}",  # the kernel waits once, not once for each
                *(f"netns del {plan.netns(index)}" for index in indices),
            ],
            force=True,
        )
        for index in indices:
            _forget_connections(plan.slot_end(index))
        stayed = leftovers(plan.tag) & set(indices)
        if stayed:
            raise HostFailure(
                "Network slots could not be removed", detail=f"slots {sorted(stayed)}"
            )


def _forget_connections(address: IPv4Address) -> None:
    """A slot that is gone ends its connections without a word: the host would keep them for days,
    and count them for whoever has the address next."""
    try:
        forget_connections(address)
    except OSError as error:
        _log.warning("connections of a removed slot are kept", detail=str(error))


def _end_processes_of(netns: str) -> None:
    try:
        inside = os.stat(NETNS_DIR / netns)
    except FileNotFoundError:
        return
    home = os.stat("/proc/thread-self/ns/net")
    if inside.st_dev != home.st_dev or inside.st_ino == home.st_ino:
        return  # a name without a namespace behind it
    for pid in processes_in_netns(inside.st_ino):
        kill_now(pid)


def _uplinks() -> set[str]:
    return {route.dev for route in commands.routes() if route.dst == "default" and route.dev}


def _enable_forwarding(names: Iterable[str]) -> None:
    for name in names:
        _write_sysctl(f"ipv4/conf/{name}/forwarding", "1")


def _write_sysctl(name: str, value: str, *, required: bool = True) -> None:
    path = SYSCTL / name
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except OSError as error:
        if required:
            raise HostFailure(
                "A network setting of the kernel failed", detail=str(error)
            ) from error
