"""The network policies of sandboxes, and the history of their changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.model.events import (
    DEADLINE_NEAR,
    NETWORK,
    RESPONDING,
    SANDBOX,
    SILENT,
    UPDATED,
)
from wrenn_sandbox.model.limits import EVENTS_KEPT
from wrenn_sandbox.model.sandbox import Event, State
from wrenn_sandbox.wire.messages import Egress

from .database import keep_newest
from .quotas import QuotaTransaction
from .records import Sandbox
from .tables import sandbox_events, sandboxes, secrets
from .team_events import record_event

_COPIES = {
    Event.CHECKPOINT,
    Event.CHECKPOINTED,
    Event.CHECKPOINT_FAILED,
    Event.FORK,
    Event.FORKED,
    Event.FORK_FAILED,
}
UNRELATED: Final = frozenset({NETWORK, UPDATED, DEADLINE_NEAR, *_COPIES})
"""What says nothing of whether a guest responds."""

_REPEATED = UNRELATED | {
    Event.PAUSE,
    Event.RESUME,
    Event.SNAPSHOT,
    Event.ROLLBACK,
    SILENT,
    RESPONDING,
}
"""What can happen to a sandbox again and again."""


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """A change of a sandbox's policy, by whom and why."""

    policy: Egress
    actor: str
    reason: str
    at: datetime


class TeamPolicies:
    """The policies of one team's sandboxes; those of others do not exist here."""

    def __init__(self, team_id: TeamId, guard: QuotaTransaction) -> None:
        self._team_id = team_id
        self._guard = guard
        self._mine = sandboxes.c.team_id == team_id

    async def change(
        self, sandbox_id: SandboxId, change: PolicyChange, states: Sequence[State]
    ) -> State | None:
        """Keep another policy if the sandbox is in one of these states.

        Returns the state that it is in, None where there is no such sandbox. Raises
        `InvalidRequest` where one of the policy's secrets is gone.
        """
        this = (sandboxes.c.id == sandbox_id) & self._mine
        allowed = sandboxes.c.state.in_(states)
        async with self._guard.write(self._team_id) as connection:
            await self._require(connection, change.policy)
            result = await connection.execute(
                update(sandboxes)
                .where(this, allowed)
                .values(network=change.policy, last_updated=change.at)
                .returning(sandboxes.c.state)
            )
            state = result.scalar_one_or_none()
            if state is None:
                found = await connection.execute(select(sandboxes.c.state).where(this))
                state = found.scalar_one_or_none()
            else:
                await _note(connection, self._team_id, sandbox_id, State(state), change)
        return None if state is None else State(state)

    async def _require(self, connection: AsyncConnection, policy: Egress) -> None:
        if not policy.secrets:
            return
        query = select(secrets.c.name).where(secrets.c.team_id == self._team_id)
        known = (await connection.execute(query)).scalars().all()
        for rule in policy.secrets:
            if rule.secret not in known:
                raise InvalidRequest(f"There is no secret {rule.secret} any more")


class AllPolicies:
    """Policies of every team's sandboxes, for the platform's own work."""

    def __init__(self, guard: QuotaTransaction) -> None:
        self._guard = guard

    async def note(self, sandbox: Sandbox, change: PolicyChange) -> None:
        """Add to the history of a running sandbox that its policy was set again."""
        async with self._guard.write(sandbox.team_id) as connection:
            await _note(connection, sandbox.team_id, sandbox.id, State.RUNNING, change)


async def _note(
    connection: AsyncConnection,
    team_id: TeamId,
    sandbox_id: SandboxId,
    state: State,
    change: PolicyChange,
) -> None:
    await note(
        connection,
        team_id,
        sandbox_id,
        NETWORK,
        change.actor,
        change.at,
        from_state=state,
        to_state=state,
        reason=change.reason,
    )


async def note(
    connection: AsyncConnection,
    team_id: TeamId,
    sandbox_id: SandboxId,
    event: str,
    actor: str,
    at: datetime,
    *,
    from_state: State | None,
    to_state: State,
    reason: str | None = None,
    told_at: datetime | None = None,
) -> None:
    """Add a row to the history of a sandbox, and tell its team, as of `told_at` if that is later.

    Old rows go when that can happen again and again.
    """
    await connection.execute(
        insert(sandbox_events).values(
            sandbox_id=sandbox_id,
            event=event,
            from_state=from_state,
            to_state=to_state,
            reason=reason,
            actor=actor,
            at=at,
        )
    )
    await record_event(
        connection,
        team_id,
        SANDBOX + event,
        told_at or at,
        {
            "sandbox_id": sandbox_id,
            "from": from_state,
            "to": to_state,
            "reason": reason,
            "actor": actor,
        },
    )
    if event in _REPEATED:
        mine = sandbox_events.c.sandbox_id == sandbox_id
        await keep_newest(connection, sandbox_events, mine, EVENTS_KEPT)
