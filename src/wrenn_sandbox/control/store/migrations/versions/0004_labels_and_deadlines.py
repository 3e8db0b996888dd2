"""What callers of many sandboxes need: labels, environments, idempotency keys, deadlines."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("sandboxes", sa.Column("deadline_at", _TIME))
    op.add_column("sandboxes", sa.Column("deadline_told", _TIME))
    op.add_column(
        "sandboxes", sa.Column("on_deadline", sa.String(8), nullable=False, server_default="pause")
    )
    op.create_index("sandboxes_by_deadline", "sandboxes", ["deadline_at"])
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
    op.create_table(
        "idempotency_keys",
        sa.Column(
            "team_id",
            sa.String(40),
            sa.ForeignKey("teams.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("operation", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(80), nullable=False),
        sa.Column("answer", sa.Text),
        sa.Column("created_at", _TIME, nullable=False),
    )
    op.create_index("idempotency_keys_by_age", "idempotency_keys", ["created_at"])
    op.create_index(
        "idempotency_keys_by_team_and_age", "idempotency_keys", ["team_id", "created_at"]
    )
