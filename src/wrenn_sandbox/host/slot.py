"""What a sandbox gets of the network: one slot."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol

from wrenn_sandbox.model.network import NetworkPolicy
from wrenn_sandbox.wire.metrics import SlotMetrics

GUEST_IP = "169.254.0.21"
GATEWAY_IP = "169.254.0.22"
GUEST_PREFIX_LENGTH = 30
GUEST_MAC = "02:00:00:00:00:01"
TAP_MAC = "02:00:00:00:00:02"
TAP_NAME = "tap0"
UPLINK_NAME = "eth0"
PORT_MARK: Final = 0x57726570
"""What packets to ports of a guest bear: its slot lets nothing else through but to its agent."""

NOTHING: Final[Mapping[int, NetworkPolicy]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one VM on the network; every guest sees the same addresses in it.

    With `netns` the guest hangs on the persistent tap `tap` of that network namespace, and
    `host_ip` is the address it leaves the namespace with (unique on this machine). Without,
    the VMM does user-mode networking and forwards `host_port` of the loopback address to the
    guest agent. `uid` is the unprivileged user and group of the VMM.
    """

    index: int
    netns: str | None
    host_ip: str
    uid: int
    tap: str | None = TAP_NAME
    host_port: int | None = None
    guest_ip: str = GUEST_IP


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a guest has received and sent."""

    received: int
    sent: int


@dataclass(frozen=True, slots=True)
class Denials:
    """How often a guest was refused a name, and the last of those names, newest last."""

    count: int = 0
    names: tuple[str, ...] = ()


class SlotSource(Protocol):
    """Where the host takes slots from: namespaces with taps, or user-mode networking."""

    async def start(self, keep: Mapping[int, NetworkPolicy] = NOTHING) -> None:
        """Reclaim what a dead process left, then fill the pool.

        The slots `keep` stay, with the rules of this server and the policy named there.
        """

    async def acquire(self) -> Slot:
        """A slot that nobody else has. Raises `HostFailure` or `NoCapacity`."""

    async def apply(self, slot: Slot, policy: NetworkPolicy) -> None:
        """Let the slot's guest reach what the policy says, and nothing else from now on.

        A slot whose policy was never set reaches nothing. Raises `HostFailure`.
        """

    def applied(self, slot: Slot) -> NetworkPolicy | None:
        """The policy that the slot's rules hold; None when that is not known."""

    def denials(self, slot: Slot) -> Denials | None:
        """What the slot's guest was refused by name; None where its policy has no names."""

    def metrics(self) -> SlotMetrics:
        """How many are in use, ready, and possible."""

    @property
    def refusals(self) -> int:
        """How often there was no address left for a slot."""

    def traffic(self) -> Mapping[int, Traffic]:
        """What went through each slot since it was made, by index, where that is known.

        Blocks; raises OSError.
        """

    def release(self, slot: Slot) -> None:
        """Give a slot back; its VM has ended. A second time has no effect."""

    async def close(self, keep: Set[int] = frozenset()) -> None:
        """Remove every slot that is not in `keep`."""
