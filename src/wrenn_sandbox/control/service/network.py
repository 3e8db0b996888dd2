"""Network policies: which are accepted, and how a change reaches a sandbox.

The store is written first and says what is wanted; the host follows at once or, where the server or
the host failed in between, when the reconciler sees that it applies another policy.
"""

import asyncio
from typing import Final
from weakref import WeakValueDictionary

import structlog

from wrenn_sandbox.control.store.events import PolicyChange
from wrenn_sandbox.errors import InvalidRequest, NotFound
from wrenn_sandbox.ids import SandboxId, TeamId, new_operation_id
from wrenn_sandbox.model.network import InvalidPolicy, NetworkPolicy, closed_to_all
from wrenn_sandbox.model.sandbox import State
from wrenn_sandbox.wire.messages import Egress

from .context import ControlContext
from .lifecycle import not_possible

_log = structlog.get_logger(__name__)
_CHANGEABLE: Final = (State.RUNNING, State.PAUSED)


class NetworkPolicies:
    """`closed` are the ranges that no policy opens."""

    def __init__(self, context: ControlContext) -> None:
        self._store = context.store
        self._host = context.host
        self._operations = context.operations
        self._wakeups = context.wakeups
        self._closed = closed_to_all(
            context.settings.network_cidr, context.settings.allowable_cidrs
        )
        self._clock = context.clock
        self._order: WeakValueDictionary[SandboxId, asyncio.Lock] = WeakValueDictionary()

    def accepted(self, wanted: Egress, prefix: str = "") -> Egress:
        """The policy that a caller asks for, each range once.

        `InvalidRequest` names the field behind `prefix`.
        """
        try:
            policy = NetworkPolicy.parse(
                internet=wanted.internet, allow=wanted.allow, deny=wanted.deny
            )
            policy.require_open(self._closed)
        except InvalidPolicy as error:
            raise InvalidRequest(f"{prefix}{error}") from error
        return Egress.of(policy)

    async def change(self, team_id: TeamId, sandbox_id: SandboxId, wanted: Egress) -> Egress:
        """Give a running or paused sandbox another policy.

        When this returns the policy holds, also for open connections. Raises `InvalidRequest`,
        `NotFound`, `InvalidState` and what `Host.set_network` raises; after the latter the policy
        is wanted and the reconciler goes on trying.
        """
        policy = self.accepted(wanted)
        if await self._store.team(team_id).sandboxes.life(sandbox_id) is None:
            raise NotFound("There is no such sandbox")
        return await self._operations.run(sandbox_id, self._change(team_id, sandbox_id, policy))

    async def _change(self, team_id: TeamId, sandbox_id: SandboxId, policy: Egress) -> Egress:
        async with self._in_order(sandbox_id):
            change = PolicyChange(policy, "user", _summary(policy), self._clock())
            state = await self._store.team(team_id).policies.change(sandbox_id, change, _CHANGEABLE)
            if state is None:
                raise NotFound("There is no such sandbox")
            if state not in _CHANGEABLE:
                raise not_possible(state, "only a running or paused one can be given a policy")
            if state is State.RUNNING:
                await self._tell(sandbox_id, policy)
        return policy

    async def _tell(self, sandbox_id: SandboxId, policy: Egress) -> None:
        try:
            await self._host.set_network(sandbox_id, new_operation_id(), policy)
        except NotFound:
            # paused or gone meanwhile: a resume takes the policy from the store
            self._wakeups.reconciler.set()
        except BaseException:
            self._wakeups.reconciler.set()
            raise

    async def apply_again(self, sandbox_id: SandboxId, actor: str) -> None:
        """Let the host of a running sandbox apply what the store says; nothing for any other."""
        async with self._in_order(sandbox_id):
            sandbox = await self._store.all_sandboxes.get(sandbox_id)
            if sandbox is None or sandbox.state is not State.RUNNING:
                return
            await self._host.set_network(sandbox_id, new_operation_id(), sandbox.network)
            reason = "the host applied another network policy"
            change = PolicyChange(sandbox.network, actor, reason, self._clock())
            await self._store.policies.note(sandbox, change)
        _log.warning("corrected", sandbox_id=sandbox_id, reason=reason)

    def _in_order(self, sandbox_id: SandboxId) -> asyncio.Lock:
        """One change at a time: the last one stored is the last one applied."""
        return self._order.setdefault(sandbox_id, asyncio.Lock())


def _summary(policy: Egress) -> str:
    internet = "open" if policy.internet else "closed"
    return f"internet {internet}, {len(policy.allow)} allowed, {len(policy.deny)} denied"
