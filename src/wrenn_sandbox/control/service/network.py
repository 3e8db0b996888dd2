"""Network policies: which are accepted, and how a change reaches a sandbox.

The store is written first and says what is wanted; the host follows at once or, where the server or
the host failed in between, when the reconciler sees that it applies another policy.
"""

import asyncio
from collections.abc import Iterable
from typing import Final
from weakref import WeakValueDictionary

import structlog

from wrenn_sandbox.control.store.events import PolicyChange
from wrenn_sandbox.control.store.records import Sandbox
from wrenn_sandbox.errors import InvalidRequest, NotFound
from wrenn_sandbox.ids import SandboxId, TeamId, new_operation_id
from wrenn_sandbox.model.network import InvalidPolicy, NetworkPolicy, closed_to_all
from wrenn_sandbox.model.sandbox import State
from wrenn_sandbox.model.secrets import Injection
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.messages import Egress

from .context import ControlContext
from .injections import Injections
from .lifecycle import not_possible

_log = structlog.get_logger(__name__)
_CHANGEABLE: Final = (State.RUNNING, State.PAUSED)
_AT_ONCE: Final = 8
_RENEWAL_SEC: Final = 10.0


class NetworkPolicies:
    """`closed` are the ranges that no policy opens."""

    def __init__(self, context: ControlContext, injections: Injections) -> None:
        self._injections = injections
        self._store = context.store
        self._host = context.host
        self._operations = context.operations
        self._wakeups = context.wakeups
        self._closed = closed_to_all(
            context.settings.network_cidr, context.settings.allowable_cidrs
        )
        self._clock = context.clock
        self._order: WeakValueDictionary[SandboxId, asyncio.Lock] = WeakValueDictionary()

    async def accepted(self, team_id: TeamId, wanted: Egress, prefix: str = "") -> Egress:
        """The policy that a caller asks for, each range once.

        `InvalidRequest` names the field behind `prefix`.
        """
        try:
            policy = NetworkPolicy.parse(
                internet=wanted.internet,
                allow=wanted.allow,
                deny=wanted.deny,
                secrets=wanted.secrets,
            )
            policy.require_open(self._closed)
        except InvalidPolicy as error:
            raise InvalidRequest(f"{prefix}{error}") from error
        accepted = Egress.of(policy)
        await self._injections.require(team_id, accepted, prefix)
        return accepted

    async def change(self, team_id: TeamId, sandbox_id: SandboxId, wanted: Egress) -> Egress:
        """Give a running or paused sandbox another policy.

        When this returns the policy holds, also for open connections. Raises `InvalidRequest`,
        `NotFound`, `InvalidState` and what `Host.set_network` raises; after the latter the policy
        is wanted and the reconciler goes on trying.
        """
        policy = await self.accepted(team_id, wanted)
        if await self._store.team(team_id).sandboxes.life(sandbox_id) is None:
            raise NotFound("There is no such sandbox")
        return await self._operations.run(sandbox_id, self._change(team_id, sandbox_id, policy))

    async def _change(self, team_id: TeamId, sandbox_id: SandboxId, policy: Egress) -> Egress:
        async with self._in_order(sandbox_id):
            injection = await self._injections.of(team_id, sandbox_id, policy)
            change = PolicyChange(policy, "user", _summary(policy), self._clock())
            state = await self._store.team(team_id).policies.change(sandbox_id, change, _CHANGEABLE)
            if state is None:
                raise NotFound("There is no such sandbox")
            if state not in _CHANGEABLE:
                raise not_possible(state, "only a running or paused one can be given a policy")
            if state is State.RUNNING:
                await self._tell(sandbox_id, policy, injection)
        return policy

    async def _tell(
        self, sandbox_id: SandboxId, policy: Egress, injection: Injection | None
    ) -> None:
        try:
            await self._host.set_network(
                sandbox_id, new_operation_id(), policy, injection=injection
            )
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
            await self._apply(sandbox)
            reason = "the host applied another network policy"
            change = PolicyChange(sandbox.network, actor, reason, self._clock())
            await self._store.policies.note(sandbox, change)
        _log.warning("corrected", sandbox_id=sandbox_id, reason=reason)

    async def renew(self, sandbox_ids: Iterable[SandboxId]) -> None:
        """Let hosts have the values that secrets of running sandboxes have now.

        What does not succeed soon is left to the reconciler.
        """
        turn = asyncio.Semaphore(_AT_ONCE)

        async def renew(sandbox_id: SandboxId) -> None:
            async with turn:
                await self._operations.run(sandbox_id, self.apply_values(sandbox_id))

        try:
            async with asyncio.timeout(patience(_RENEWAL_SEC)):
                done = await asyncio.gather(*map(renew, sandbox_ids), return_exceptions=True)
            failed = any(isinstance(each, BaseException) for each in done)
        except TimeoutError:
            failed = True
        if failed:
            self._wakeups.reconciler.set()

    async def apply_values(self, sandbox_id: SandboxId) -> None:
        """Let the host of a running sandbox have the values that its secrets have now."""
        async with self._in_order(sandbox_id):
            sandbox = await self._store.all_sandboxes.get(sandbox_id)
            if sandbox is not None and sandbox.state is State.RUNNING:
                await self._apply(sandbox)

    async def _apply(self, sandbox: Sandbox) -> None:
        injection = await self._injections.of(sandbox.team_id, sandbox.id, sandbox.network)
        await self._host.set_network(
            sandbox.id, new_operation_id(), sandbox.network, injection=injection
        )

    def _in_order(self, sandbox_id: SandboxId) -> asyncio.Lock:
        """One change at a time: the last one stored is the last one applied."""
        return self._order.setdefault(sandbox_id, asyncio.Lock())


def _summary(policy: Egress) -> str:
    internet = "open" if policy.internet else "closed"
    rules = f", {len(policy.secrets)} with secrets" if policy.secrets else ""
    return f"internet {internet}, {len(policy.allow)} allowed, {len(policy.deny)} denied{rules}"
