"""The labels of sandboxes: each row of `sandboxes` has its own, and `sandbox_labels` finds them."""

from collections.abc import Mapping

from sqlalchemy import ColumnElement, delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.ids import SandboxId, TeamId

from .tables import sandbox_labels, sandboxes


async def index(
    connection: AsyncConnection, team_id: TeamId, sandbox_id: SandboxId, labels: Mapping[str, str]
) -> None:
    """Let a sandbox be found by these labels, and by no others."""
    await connection.execute(
        delete(sandbox_labels).where(sandbox_labels.c.sandbox_id == sandbox_id)
    )
    if labels:
        rows = [
            {"sandbox_id": sandbox_id, "team_id": team_id, "key": key, "value": value}
            for key, value in labels.items()
        ]
        await connection.execute(insert(sandbox_labels), rows)


def labelled(team_id: TeamId, key: str, value: str) -> ColumnElement[bool]:
    """Whether a sandbox of this team has this label."""
    return sandboxes.c.id.in_(
        select(sandbox_labels.c.sandbox_id).where(
            sandbox_labels.c.team_id == team_id,
            sandbox_labels.c.key == key,
            sandbox_labels.c.value == value,
        )
    )
