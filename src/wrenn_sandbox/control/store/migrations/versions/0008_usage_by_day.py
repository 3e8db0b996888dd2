"""How long the sandboxes of each team have run, by day.

Of sandboxes that run it counts from their last start; what ended before is not known any more.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sandboxes", sa.Column("running_since", sa.DateTime(timezone=True)))
    op.execute("UPDATE sandboxes SET running_since = started_at WHERE status = 'running'")
    op.create_table(
        "usage_days",
        sa.Column(
            "team_id",
            sa.String(40),
            sa.ForeignKey("teams.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("running_us", sa.BigInteger, nullable=False),
        sa.Column("vcpu_us", sa.BigInteger, nullable=False),
        sa.Column("memory_mb_us", sa.BigInteger, nullable=False),
    )
