"""What callers of many sandboxes need: labels, environments."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sandboxes", sa.Column("metadata", sa.Text))
    op.create_table(
        "sandbox_labels",
        sa.Column(
            "sandbox_id",
            sa.String(40),
            sa.ForeignKey("sandboxes.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("key", sa.String(128), primary_key=True),
        sa.Column("team_id", sa.String(40), nullable=False),
        sa.Column("value", sa.String(512), nullable=False),
    )
    op.create_index("sandbox_labels_by_value", "sandbox_labels", ["team_id", "key", "value"])
    op.create_table(
        "sandbox_envs",
        sa.Column(
            "sandbox_id",
            sa.String(40),
            sa.ForeignKey("sandboxes.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("envs", sa.Text, nullable=False),
    )
