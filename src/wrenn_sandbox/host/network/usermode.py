"""Slots for user-mode networking: no root, no namespaces; the VMM itself is the network.

The only way in is a port of the loopback address that the VMM forwards to the guest agent. The only
safe way out is none: the VMM's own gateway would lead guests to the services of this machine, so
the driver restricts it and guests have no internet.
"""

import socket
from collections.abc import Mapping, Set

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.slot import NOTHING, Denials, Slot, Traffic
from wrenn_sandbox.model.network import NetworkPolicy
from wrenn_sandbox.wire.metrics import SlotMetrics

LOOPBACK = "127.0.0.1"
ATTEMPTS = 64


class UserModeSlots:
    """A slot's index is its loopback port, so its index alone tells its slot."""

    def __init__(self, uid_base: int) -> None:
        self._uid_base = uid_base
        self.refusals = 0
        self._used: set[int] = set()
        self._policies: dict[int, NetworkPolicy] = {}

    async def start(self, keep: Mapping[int, NetworkPolicy] = NOTHING) -> None:
        self._used = set(keep)
        self._policies = dict(keep)

    async def acquire(self) -> Slot:
        """A slot with a port that is free now; the VMM binds it. Raises `HostFailure`."""
        for _ in range(ATTEMPTS):
            port = _free_port()
            if port not in self._used:
                self._used.add(port)
                return Slot(
                    index=port,
                    netns=None,
                    host_ip=LOOPBACK,
                    uid=self._uid_base + port,
                    tap=None,
                    host_port=port,
                )
        raise HostFailure("No free loopback port was found for a sandbox")

    async def apply(self, slot: Slot, policy: NetworkPolicy) -> None:
        """Note the policy. Guests reach nothing here, so `allow` and `internet` have no effect."""
        self._policies[slot.index] = policy

    def applied(self, slot: Slot) -> NetworkPolicy | None:
        return self._policies.get(slot.index)

    def denials(self, slot: Slot) -> Denials | None:
        """Guests reach nothing, by name neither."""
        return None

    def metrics(self) -> SlotMetrics:
        return SlotMetrics(used=len(self._used))

    def traffic(self) -> dict[int, Traffic]:
        """Nobody counts it here."""
        return {}

    def release(self, slot: Slot) -> None:
        self._used.discard(slot.index)
        self._policies.pop(slot.index, None)

    async def close(self, keep: Set[int] = frozenset()) -> None:
        self._used &= keep


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
