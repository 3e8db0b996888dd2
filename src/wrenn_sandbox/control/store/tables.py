"""The tables of the control plane, the same on SQLite and PostgreSQL."""

from datetime import UTC, datetime

import msgspec
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    false,
)
from sqlalchemy.types import TypeDecorator

from wrenn_sandbox.wire.messages import Egress

metadata = MetaData()


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time: timezone-aware UTC in Python whatever the database keeps."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Policy(TypeDecorator[Egress]):
    """A network policy as JSON; the default one as NULL.

    Its texts were checked before they were written and are not parsed again: thousands of rows are
    read at once, with 256 ranges each at worst.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Egress | None, dialect: Dialect) -> str | None:
        if value is None or value == Egress():
            return None
        return msgspec.json.encode(value).decode("ascii")

    def process_result_value(self, value: str | None, dialect: Dialect) -> Egress:
        return Egress() if value is None else msgspec.json.decode(value, type=Egress)


class Texts(TypeDecorator[dict[str, str]]):
    """Texts by their names as a JSON object; none as NULL."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: dict[str, str] | None, dialect: Dialect) -> str | None:
        return msgspec.json.encode(value).decode() if value else None

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, str]:
        return {} if value is None else msgspec.json.decode(value, type=dict[str, str])


_BigId = BigInteger().with_variant(Integer(), "sqlite")

users = Table(
    "users",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("email", String(320), nullable=False, unique=True),
    Column("password_hash", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Column("disabled_at", UtcDateTime),
    Column("tokens_not_before", UtcDateTime),
)

identities = Table(
    "identities",
    metadata,
    Column("provider", String(32), primary_key=True),
    Column("subject", String(255), primary_key=True),
    Column("user_id", ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index("identities_by_user", "user_id"),
)

spent_states = Table(
    "spent_states",
    metadata,
    Column("state", String(64), primary_key=True),
    Column("expires_at", UtcDateTime, nullable=False),
    Index("spent_states_by_expiry", "expires_at"),
)

teams = Table(
    "teams",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(400), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("quota", Text),
    Column("last_event", BigInteger, nullable=False, server_default="0"),
)

team_events = Table(
    "team_events",
    metadata,
    Column("team_id", ForeignKey("teams.id", ondelete="CASCADE"), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("type", String(64), nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Column("data", Text, nullable=False),
    Index("team_events_by_time", "at"),
)

usage_days = Table(
    "usage_days",
    metadata,
    Column("team_id", ForeignKey("teams.id", ondelete="CASCADE"), primary_key=True),
    Column("day", Date, primary_key=True),
    Column("running_us", BigInteger, nullable=False),
    Column("vcpu_us", BigInteger, nullable=False),
    Column("memory_mb_us", BigInteger, nullable=False),
)

memberships = Table(
    "memberships",
    metadata,
    Column("user_id", ForeignKey("users.id", ondelete="CASCADE"), primary_key=True),
    Column("team_id", ForeignKey("teams.id", ondelete="CASCADE"), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index("memberships_by_team", "team_id"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("team_id", ForeignKey("teams.id", ondelete="CASCADE"), nullable=False),
    Column("name", Text, nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("key_prefix", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("last_used", UtcDateTime),
    Index("api_keys_by_team", "team_id", "created_at", "id"),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("team_id", ForeignKey("teams.id", ondelete="CASCADE"), nullable=False),
    Column("url", Text, nullable=False),
    Column("events", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("secret", String(80), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("trying_since", UtcDateTime),
    Column("retry_at", UtcDateTime),
    Column("failing_since", UtcDateTime),
    Column("claimed_until", UtcDateTime),
    Column("disabled_at", UtcDateTime),
    Column("disabled_reason", Text),
    Index("webhooks_by_team", "team_id", "created_at", "id"),
)

secrets = Table(
    "secrets",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("team_id", ForeignKey("teams.id", ondelete="CASCADE"), nullable=False),
    Column("name", String(64), nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    Column("version", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Index("secrets_by_team", "team_id", "created_at", "id"),
    Index("secrets_by_name", "team_id", "name", unique=True),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("number", _BigId, primary_key=True, autoincrement=True),
    Column("webhook_id", ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("event_id", String(40), nullable=False),
    Column("type", String(64), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("status", Integer),
    Column("error", Text),
    Column("duration_ms", Integer, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Index("webhook_deliveries_by_webhook", "webhook_id", "number"),
)

sandboxes = Table(
    "sandboxes",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("team_id", ForeignKey("teams.id", ondelete="CASCADE"), nullable=False),
    Column("state", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    Column("template", String(64), nullable=False),
    Column("image_id", String(80), nullable=False),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mb", Integer, nullable=False),
    Column("timeout_sec", Integer, nullable=False),
    Column("guest_ip", String(45)),
    Column("host_ip", String(45)),
    Column("reason", Text),
    Column("network", Policy),
    Column("metadata", Texts),
    Column("deadline_at", UtcDateTime),
    Column("deadline_told", UtcDateTime),
    Column("on_deadline", String(8), nullable=False, server_default="pause"),
    Column("auto_resume", Boolean, nullable=False, server_default=false()),
    Column("private_ports", Boolean, nullable=False, server_default=false()),
    Column("disk_bytes", BigInteger, nullable=False, server_default="0"),
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("running_since", UtcDateTime),
    Column("last_active_at", UtcDateTime),
    Column("last_updated", UtcDateTime, nullable=False),
    Index("sandboxes_by_team", "team_id", "created_at", "id"),
    Index("sandboxes_by_team_and_state", "team_id", "state"),
    Index("sandboxes_by_state", "state", "last_updated"),
    Index("sandboxes_by_deadline", "deadline_at"),
)

sandbox_labels = Table(
    "sandbox_labels",
    metadata,
    Column("sandbox_id", ForeignKey("sandboxes.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(128), primary_key=True),
    Column("team_id", String(40), nullable=False),
    Column("value", String(512), nullable=False),
    Index("sandbox_labels_by_value", "team_id", "key", "value"),
)

sandbox_envs = Table(
    "sandbox_envs",
    metadata,
    Column("sandbox_id", ForeignKey("sandboxes.id", ondelete="CASCADE"), primary_key=True),
    Column("envs", Texts, nullable=False),
)

sandbox_events = Table(
    "sandbox_events",
    metadata,
    Column("number", _BigId, primary_key=True, autoincrement=True),
    Column("sandbox_id", ForeignKey("sandboxes.id", ondelete="CASCADE"), nullable=False),
    Column("event", String(32), nullable=False),
    Column("from_state", String(16)),
    Column("to_state", String(16), nullable=False),
    Column("reason", Text),
    Column("actor", String(64), nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Index("sandbox_events_by_sandbox", "sandbox_id", "number"),
)

templates = Table(
    "templates",
    metadata,
    Column("team_id", ForeignKey("teams.id", ondelete="CASCADE"), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("image_id", String(80), nullable=False),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mb", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("sandbox_id", String(40)),
)

snapshot_intents = Table(
    "snapshot_intents",
    metadata,
    Column("team_id", ForeignKey("teams.id", ondelete="CASCADE"), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column(
        "sandbox_id",
        ForeignKey("sandboxes.id", ondelete="CASCADE"),
        nullable=False,
        unique=True,
    ),
    Column("operation_id", String(40), nullable=False),
    Column("image_id", String(80), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("team_id", ForeignKey("teams.id", ondelete="CASCADE"), primary_key=True),
    Column("operation", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("subject", String(80), nullable=False),
    Column("answer", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Index("idempotency_keys_by_age", "created_at"),
    Index("idempotency_keys_by_team_and_age", "team_id", "created_at"),
)

fork_images = Table(
    "fork_images",
    metadata,
    Column("image_id", String(80), primary_key=True),
    Column("sandbox_id", ForeignKey("sandboxes.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index("fork_images_by_sandbox", "sandbox_id"),
)

rollbacks = Table(
    "rollbacks",
    metadata,
    Column("sandbox_id", ForeignKey("sandboxes.id", ondelete="CASCADE"), primary_key=True),
    Column("operation_id", String(40), nullable=False),
    Column("image_id", String(80), nullable=False),
)

discarded_images = Table(
    "discarded_images",
    metadata,
    Column("image_id", String(80), primary_key=True),
    Column("created_at", UtcDateTime, nullable=False),
)

installation = Table(
    "installation",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("id", String(40), nullable=False),
    Column("draining_since", UtcDateTime),
    CheckConstraint("number = 1", name="installation_is_one"),
)

admin_actions = Table(
    "admin_actions",
    metadata,
    Column("number", _BigId, primary_key=True, autoincrement=True),
    Column("at", UtcDateTime, nullable=False),
    Column("operator", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("subject", Text, nullable=False),
)
