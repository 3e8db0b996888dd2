"""How much is kept of the history of a sandbox."""

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.model.limits import EVENTS_KEPT

from .tables import sandbox_events


async def forget_old_events(connection: AsyncConnection, sandbox_id: SandboxId) -> None:
    """To be called with each event that can happen again and again."""
    mine = sandbox_events.c.sandbox_id == sandbox_id
    oldest_kept = (
        select(sandbox_events.c.number)
        .where(mine)
        .order_by(sandbox_events.c.number.desc())
        .offset(EVENTS_KEPT - 1)
        .limit(1)
        .scalar_subquery()
    )
    await connection.execute(
        delete(sandbox_events).where(mine, sandbox_events.c.number < oldest_kept)
    )
