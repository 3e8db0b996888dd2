"""The one reader of the environment.

Every setting is a field here and is documented in `docs/settings.md` (a test compares the two):
the server's in groups that make up `Settings`, those of commands that call a server in
`ClientSettings`, what systemd tells a service in `ServiceSettings`. What needs one group takes
that one, so a process carries only what it uses. Names are `WRENN_` and the field in capitals,
except those that the contract, systemd or custom fixes (`DATABASE_URL`, `CP_PUBLIC_URL`,
`OAUTH_*`).
"""

import os
import re
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from wrenn_sandbox.model.limits import parse_rate
from wrenn_sandbox.model.network import PRIVATE
from wrenn_sandbox.model.quota import Quota


def _default_data_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/wrenn")
    return Path.home() / ".local" / "share" / "wrenn"


def _named(name: str) -> AliasChoices:
    return AliasChoices(name, name.upper())


SECRET_MIN: Final = 32
"""Characters of the secret that signs tokens: fewer could be guessed from one token."""

_DRIVERS: Final = {
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
}
"""How SQLAlchemy is told of the schemes that `DATABASE_URL` may have."""

_URL: Final = re.compile(r"[!-~]+")
_ORIGIN: Final = re.compile(r"https?://(\[[0-9a-f:]+\]|[a-z0-9.-]+)(:[0-9]{1,5})?")
"""An origin as browsers send it: lower case, no path, no slash at the end."""

_DOMAIN: Final = re.compile(
    r"(?=.{1,180}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
)
_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def _base_url(url: str) -> str:
    """`url` without a slash at its end; `ValueError` unless paths can be put behind it."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        usable = False
    if not usable or "@" in parts.netloc or "?" in url or "#" in url or not _URL.fullmatch(url):
        raise ValueError("must be a URL such as https://example.com, with no query nor user")
    return url.rstrip("/")


def _split_list(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


_SPLIT: Final = BeforeValidator(_split_list)


class CommonSettings(BaseSettings):
    """What both sides of a server need. Sizes are MB (MiB), times are seconds."""

    model_config = SettingsConfigDict(
        env_prefix="WRENN_",
        frozen=True,
        extra="ignore",
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    data_dir: Path = Field(default_factory=_default_data_dir)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"

    network_cidr: IPv4Network = IPv4Network("10.231.0.0/16")
    allowable_cidrs: Annotated[tuple[IPv4Network, ...], NoDecode, _SPLIT] = ()

    default_template: str = "minimal"
    default_vcpus: int | None = None
    default_memory_mb: int | None = None

    @field_validator("data_dir")
    @classmethod
    def _from_the_root(cls, value: Path) -> Path:
        """Disk layers and monitors name its files from elsewhere."""
        return value.absolute()

    @field_validator("allowable_cidrs")
    @classmethod
    def _check_allowable(cls, value: tuple[IPv4Network, ...]) -> tuple[IPv4Network, ...]:
        for each in value:
            if not any(each.subnet_of(private) for private in PRIVATE):
                raise ValueError(f"{each} is not within {', '.join(map(str, PRIVATE))}")
        return value


class EdgeSettings(CommonSettings):
    """How clients reach the server, and what connections may take."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    tls_cert: Path | None = None
    tls_key: Path | None = None
    trusted_proxies: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, _SPLIT] = ()
    domain: str = "localhost"
    cors_origins: Annotated[tuple[str, ...], NoDecode, _SPLIT] = ()

    max_connections: int = Field(default=2048, ge=1)
    max_connections_per_address: int = Field(default=256, ge=1)
    body_limit_bytes: int = 1024 * 1024

    head_timeout_sec: float = Field(default=15.0, gt=0)
    body_timeout_sec: float = Field(default=60.0, gt=0)
    write_timeout_sec: float = Field(default=300.0, gt=0)
    keep_alive_sec: float = Field(default=15.0, gt=0)
    shutdown_grace_sec: float = 10.0

    @field_validator("domain")
    @classmethod
    def _check_domain(cls, value: str) -> str:
        if not _DOMAIN.fullmatch(value):
            raise ValueError("must be a domain in lower case such as sandboxes.example.com")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is not an origin such as https://app.example.com")
        return value


class OAuthSettings(CommonSettings):
    """Logins with a provider of identities."""

    public_url: str | None = Field(default=None, validation_alias=_named("cp_public_url"))
    oauth_github_client_id: str | None = Field(
        default=None, validation_alias=_named("oauth_github_client_id")
    )
    oauth_github_client_secret: SecretStr | None = Field(
        default=None, validation_alias=_named("oauth_github_client_secret")
    )
    oauth_github_url: str = Field(
        default="https://github.com", validation_alias=_named("oauth_github_url")
    )
    oauth_github_api_url: str | None = Field(
        default=None, validation_alias=_named("oauth_github_api_url")
    )
    oauth_redirect_url: str | None = Field(
        default=None, validation_alias=_named("oauth_redirect_url")
    )
    oauth_timeout_sec: float = Field(default=10.0, gt=0)

    @field_validator(
        "oauth_github_client_id",
        "oauth_github_client_secret",
        "oauth_github_api_url",
        "oauth_redirect_url",
        "public_url",
        mode="before",
    )
    @classmethod
    def _without_empty(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("oauth_github_url", "oauth_github_api_url", "oauth_redirect_url", "public_url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        return None if value is None else _base_url(value)

    @model_validator(mode="after")
    def _check_oauth(self) -> Self:
        given = (self.oauth_github_client_id, self.oauth_github_client_secret)
        if given == (None, None):
            return self
        if None in given:
            raise ValueError(
                "GitHub login needs OAUTH_GITHUB_CLIENT_ID and OAUTH_GITHUB_CLIENT_SECRET, or"
                " neither of them"
            )
        for url, what in (
            (self.public_url, "CP_PUBLIC_URL, the URL under which browsers reach this server"),
            (
                self.oauth_redirect_url,
                "OAUTH_REDIRECT_URL, the URL of the front end that gets the token",
            ),
        ):
            if url is None:
                raise ValueError(f"GitHub login needs {what}")
        return self


class QuotaSettings(CommonSettings):
    """What a team may have, unless it has limits of its own."""

    quota_running: int = Field(default=100, ge=0)
    quota_vcpus: int = Field(default=0, ge=0)
    quota_memory_mb: int = Field(default=0, ge=0)
    quota_sandboxes: int = Field(default=1000, ge=0)
    quota_snapshots: int = Field(default=100, ge=0)
    quota_disk_mb: int = Field(default=102_400, ge=0)
    quota_api_keys: int = Field(default=100, ge=0)

    @property
    def quota(self) -> Quota:
        """The limits that hold for every team without limits of its own."""
        names = Quota.__struct_fields__
        return Quota(**{name: getattr(self, f"quota_{name}") for name in names})


class ControlSettings(EdgeSettings, OAuthSettings, QuotaSettings):
    """The control plane and its API."""

    database_url: str | None = Field(default=None, validation_alias=_named("database_url"))
    jwt_secret: SecretStr | None = None
    secrets_key: SecretStr | None = None
    signup: Literal["open", "closed"] = "open"
    auth_attempts: str = "20/minute"
    auth_attempts_per_address: str = "120/minute"
    metrics_token: SecretStr | None = None

    max_vcpus: int = Field(default=8, ge=1)
    min_memory_mb: int = Field(default=128, ge=64)
    max_memory_mb: int = Field(default=8192, ge=128)
    max_timeout_sec: int = 86_400

    calls_per_sandbox: int = Field(default=256, ge=1)
    calls_per_team: int = Field(default=1024, ge=1)
    port_connections_per_sandbox: int = Field(default=256, ge=1)
    port_connections_per_team: int = Field(default=1024, ge=1)
    port_idle_sec: float = Field(default=600.0, gt=0)
    output_limit_bytes: int = 10 * 1024 * 1024
    guest_check_sec: float = Field(default=5.0, gt=0)

    webhook_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, _SPLIT] = ()
    webhook_timeout_sec: float = Field(default=10.0, gt=0, le=20)

    reconcile_interval_sec: float = 5.0
    retention_sec: float = 86_400.0
    on_stop: Literal["keep", "pause"] = "keep"
    stop_pause_timeout_sec: float = Field(default=60.0, gt=0)

    @field_validator("auth_attempts", "auth_attempts_per_address")
    @classmethod
    def _check_rate(cls, value: str) -> str:
        parse_rate(value)
        return value

    @field_validator("jwt_secret", "secrets_key")
    @classmethod
    def _check_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value().strip()) < SECRET_MIN:
            raise ValueError(f"must have at least {SECRET_MIN} characters, all of them random")
        return value

    @field_validator("database_url")
    @classmethod
    def _check_database(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, mark, _ = value.partition("://")
        if not mark or scheme not in _DRIVERS:
            raise ValueError("must begin with postgresql:// or sqlite:///")
        from sqlalchemy import make_url  # as above
        from sqlalchemy.exc import ArgumentError

        try:
            url = make_url(value)
            usable = 0 < (url.port or 1) < 65536
        except (ArgumentError, ValueError):
            usable = False
        if not usable:  # without what was given, which holds a password
            raise ValueError("is not a URL such as postgresql://user:password@host/name")
        if value.startswith("sqlite") and url.database in (None, "", ":memory:"):
            raise ValueError("must name a file, as sqlite:////var/lib/wrenn/wrenn.db does")
        modes = parse_qs(urlsplit(value).query).get("sslmode", [])
        for mode in modes:
            if mode not in _SSL_MODES:
                raise ValueError(f"sslmode must be one of {', '.join(_SSL_MODES)}")
        return value

    @cached_property
    def sql_url(self) -> str:
        """The SQLAlchemy URL: SQLite under the data directory unless `DATABASE_URL` says else."""
        if self.database_url is None:
            return f"sqlite+aiosqlite:///{self.data_dir / 'wrenn.db'}"
        scheme, _, rest = self.database_url.partition("://")
        if scheme.startswith("postgres"):  # what libpq calls `sslmode` is asyncpg's `ssl`
            rest = re.sub(r"([?&])sslmode=", r"\1ssl=", rest)
        return f"{_DRIVERS[scheme]}://{rest}"


class HostSettings(CommonSettings):
    """One host and the machines on it."""

    driver: Literal["auto", "qemu", "firecracker", "fake"] = "auto"
    firecracker: Path | None = None
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    cpu_model: str = Field(default="auto", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    network: Literal["auto", "tap", "user"] = "auto"
    dns_servers: Annotated[tuple[str, ...], NoDecode, _SPLIT] = ()
    vmm_uid_base: int = Field(default=720_000, ge=1000)
    egress_ca_file: Path | None = None

    guest_connections: int = Field(default=1024, ge=0, le=1_000_000)
    guest_connections_per_sec: int = Field(default=100, ge=0, le=100_000)
    guest_mbit_per_sec: int = Field(default=0, ge=0, le=100_000)
    guest_processes: int = Field(default=4096, ge=16, le=4_000_000)
    guest_reserved_mb: int = Field(default=32, ge=8, le=1024)

    slot_pool_size: int = Field(default=4, ge=0, le=256)
    slot_cooldown_sec: float = Field(default=2.0, ge=0)
    hot_pool_size: int = Field(default=1, ge=0, le=64)

    boot_timeout_sec: float = 120.0
    max_running: int = Field(default=200, ge=1)
    memory_reserve_mb: int = Field(default=512, ge=0)
    memory_overcommit: float = Field(default=4.0, ge=0)

    disk_reserve_mb: int = Field(default=1024, ge=0)
    disk_factor: int = Field(default=3, ge=3)
    disk_mbps: int = Field(default=0, ge=0, le=1_000_000)
    disk_iops: int = Field(default=0, ge=0, le=10_000_000)
    merge_diff_mb: int = Field(default=256, ge=1)
    max_disk_layers: int = Field(default=4, ge=1)
    max_variants: int = Field(default=16, ge=1)
    layers_mb: int = Field(default=10_240, ge=0)
    idle_memory_sec: float = Field(default=600.0, ge=0)

    fault_point: str = ""

    @field_validator("egress_ca_file")
    @classmethod
    def _check_authorities(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError("is not a file that can be read")
        return value


class Settings(ControlSettings, HostSettings):
    """All settings of `wrenn serve`, frozen once read: both sides in one process."""


class ServiceSettings(BaseSettings):
    """What systemd tells a service that it has started, frozen once read (systemd.exec(5))."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    notify_socket: str | None = Field(default=None, validation_alias=_named("notify_socket"))
    watchdog_usec: int = Field(default=0, ge=0, validation_alias=_named("watchdog_usec"))
    watchdog_pid: int | None = Field(default=None, validation_alias=_named("watchdog_pid"))
    journal_stream: str | None = Field(default=None, validation_alias=_named("journal_stream"))


class ClientSettings(BaseSettings):
    """What commands that call a server take from the environment, frozen once read."""

    model_config = SettingsConfigDict(
        env_prefix="WRENN_", frozen=True, extra="ignore", populate_by_name=True
    )

    url: str | None = None
    api_key: SecretStr | None = None
    config_home: Path = Field(
        default_factory=lambda: Path.home() / ".config", validation_alias=_named("xdg_config_home")
    )
    terminal: str = Field(default="xterm-256color", validation_alias=_named("term"))

    @property
    def config_file(self) -> Path:
        """Where `wrenn login` keeps the server and the key."""
        return self.config_home / "wrenn" / "config.toml"
