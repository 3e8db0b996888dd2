"""What a server open to strangers keeps: identities, disabled users, quotas, network policies."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "identities",
        sa.Column("provider", sa.String(32), primary_key=True),
        sa.Column("subject", sa.String(255), primary_key=True),
        sa.Column(
            "user_id",
            sa.String(40),
            sa.ForeignKey("users.id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("created_at", _TIME, nullable=False),
    )
    op.create_index("identities_by_user", "identities", ["user_id"])
    op.create_table(
        "spent_states",
        sa.Column("state", sa.String(64), primary_key=True),
        sa.Column("expires_at", _TIME, nullable=False),
    )
    op.create_index("spent_states_by_expiry", "spent_states", ["expires_at"])
    op.add_column("users", sa.Column("disabled_at", _TIME))
    op.add_column("users", sa.Column("tokens_not_before", _TIME))
    op.create_index("memberships_by_team", "memberships", ["team_id"])
    op.create_table(
        "admin_actions",
        sa.Column(
            "number",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            primary_key=True,
            autoincrement=True,
        ),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("operator", sa.String(64), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
    )
    op.add_column("teams", sa.Column("quota", sa.Text))
    op.add_column("sandboxes", sa.Column("network", sa.Text))
    op.add_column(
        "sandboxes", sa.Column("disk_bytes", sa.BigInteger, nullable=False, server_default="0")
    )
    op.create_index("sandboxes_by_team_and_state", "sandboxes", ["team_id", "state"])
    op.add_column("installation", sa.Column("draining_since", _TIME))
