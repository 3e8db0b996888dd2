"""Forks and rollbacks under way, and of which sandbox a template was made."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("templates", sa.Column("sandbox_id", sa.String(40)))
    op.create_table(
        "fork_images",
        sa.Column("image_id", sa.String(80), primary_key=True),
        _sandbox_id(primary_key=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("fork_images_by_sandbox", "fork_images", ["sandbox_id"])
    op.create_table(
        "rollbacks",
        _sandbox_id(primary_key=True),
        sa.Column("operation_id", sa.String(40), nullable=False),
        sa.Column("image_id", sa.String(80), nullable=False),
    )


def _sandbox_id(*, primary_key: bool) -> sa.Column[str]:
    return sa.Column(
        "sandbox_id",
        sa.String(40),
        sa.ForeignKey("sandboxes.id", ondelete="CASCADE"),
        nullable=False,
        primary_key=primary_key,
    )
