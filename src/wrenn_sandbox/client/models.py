"""What the API says, as frozen values. Memory is MiB, sizes are bytes, times carry a zone."""

from datetime import date, datetime
from typing import Literal, Self

import msgspec

from .errors import CommandFailed, ErrorDetail, decoded


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A logged-in user; `token` is valid for some hours."""

    token: str
    user_id: str
    team_id: str
    email: str


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key of the team. `key`, the secret, is there only when it was just created."""

    id: str
    team_id: str
    name: str
    key_prefix: str
    created_at: datetime
    last_used: datetime | None = None
    key: str | None = None


class SecretHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Requests by HTTPS to the host `name` have this header, set by the sandbox's host.

    `value` refers to a secret, such as `Bearer {{secret:openai}}`. `*.example.com` is every name
    with one more label.
    """

    name: str
    header: str
    value: str


class NetworkPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What a sandbox reaches: `allow` wins over `deny`, and both over `internet`.

    Ranges are IPv4, as CIDR or single addresses. A name in `allow`, such as `example.com` or
    `*.example.com`, opens HTTP on port 80 and HTTPS on port 443 of that host. Without `internet`
    and names there is no DNS either. The names of `secrets` are open by HTTPS.
    """

    internet: bool = True
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    secrets: tuple[SecretHeader, ...] = ()


class SandboxInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox as it was when the server answered. `reason` says why it is in its state,
    `disk_bytes` what it took on the host's disk when that was measured last. `metadata` holds its
    labels. At `deadline_at` what `on_deadline` says happens to it. With `auto_resume` requests to
    its ports resume it, and with `private_ports` they need its token.
    """

    id: str
    status: Literal["pending", "running", "paused", "stopped", "error"]
    template: str
    vcpus: int
    memory_mb: int
    timeout_sec: int
    created_at: datetime
    last_updated: datetime
    guest_ip: str | None = None
    host_ip: str | None = None
    reason: str | None = None
    started_at: datetime | None = None
    last_active_at: datetime | None = None
    disk_bytes: int = 0
    network: NetworkPolicy = NetworkPolicy()
    metadata: dict[str, str] = {}
    deadline_at: datetime | None = None
    on_deadline: Literal["pause", "delete"] = "pause"
    auto_resume: bool = False
    private_ports: bool = False


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    """Where the ports of a sandbox are reached: `url` with a number in the place of `{port}`.

    Where they are `private`, requests send `token` as `e2b-traffic-access-token`. Those to port
    49983, the guest agent, send `agent_token` as `X-Access-Token`.
    """

    url: str
    domain: str
    private: bool
    token: str
    agent_token: str

    def url_of(self, port: int) -> str:
        return self.url.replace("{port}", str(port))


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """A fork as it is on the wire: one of both is there."""

    sandbox: SandboxInfo | None = None
    error: ErrorDetail | None = None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One transition of a sandbox; `from_state` is absent for its creation."""

    event: str
    actor: str
    time: datetime
    to_state: str = msgspec.field(name="to")
    from_state: str | None = msgspec.field(name="from", default=None)
    reason: str | None = None


class TeamEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened: ids are numbers, one after the other for each team.

    `data` names what it happened to, such as `sandbox_id`, and why (`reason`), by whom (`actor`).
    """

    id: str
    team_id: str
    type: str
    time: datetime
    data: dict[str, str]


class Secret(msgspec.Struct, frozen=True, kw_only=True):
    """A secret without its value."""

    name: str
    created_at: datetime
    updated_at: datetime


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """Where events are delivered to. `secret` is there only when it was just created."""

    id: str
    url: str
    events: tuple[str, ...]
    description: str
    enabled: bool
    created_at: datetime
    disabled_reason: str | None = None
    failing_since: datetime | None = None
    next_attempt_at: datetime | None = None
    secret: str | None = None


class WebhookDelivery(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt to deliver: the `status` of the answer, or the `error` for which there was none.

    `retrying` has failed, and another attempt is to come.
    """

    event_id: str
    type: str
    attempt: int
    outcome: Literal["delivered", "retrying", "failed"]
    duration_ms: int
    time: datetime
    status: int | None = None
    error: str | None = None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a team may have; None is no limit."""

    running: int | None = None
    vcpus: int | None = None
    memory_mb: int | None = None
    sandboxes: int | None = None
    snapshots: int | None = None
    disk_bytes: int | None = None
    api_keys: int | None = None


class Used(msgspec.Struct, frozen=True, kw_only=True):
    """What a team has; the first three count sandboxes that run or are on their way."""

    running: int
    vcpus: int
    memory_mb: int
    sandboxes: int
    snapshots: int
    disk_bytes: int
    api_keys: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a team and what it uses of them."""

    limits: Limits
    used: Used


class DayUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a team's sandboxes used on one day (UTC): seconds, times vCPUs, times MiB of memory."""

    date: date
    running_sec: float
    vcpu_sec: float
    memory_mb_sec: float


class UsageHistory(msgspec.Struct, frozen=True, kw_only=True):
    """Every day that was asked for, in order. What runs counts until `until`."""

    until: datetime
    days: tuple[DayUsage, ...]


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """What sandboxes start from. A snapshot fixes `vcpus` and `memory_mb`.

    `sandbox_id` is the sandbox that a snapshot was made of, which can be rolled back to it.
    """

    name: str
    type: Literal["base", "snapshot"]
    size_bytes: int
    created_at: datetime
    vcpus: int | None = None
    memory_mb: int | None = None
    sandbox_id: str | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A command that has ended; 128+n is the `exit_code` of one that signal n killed.

    `truncated`: the server kept only the beginning of what was written.
    """

    cmd: str
    exit_code: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    duration_ms: int
    truncated: bool = False

    @property
    def stdout(self) -> str:
        """As text; bytes that are no UTF-8 are replaced."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """As text; bytes that are no UTF-8 are replaced."""
        return self.stderr_bytes.decode("utf-8", "replace")

    def check(self) -> Self:
        """Itself when the command succeeded, else `CommandFailed`."""
        if self.exit_code != 0:
            raise CommandFailed(self.cmd, self.exit_code, self.stderr)
        return self


class ExecAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a command as it is on the wire."""

    cmd: str
    exit_code: int
    stdout: str
    stderr: str
    duration_ms: int
    encoding: Literal["utf-8", "base64"]
    truncated: bool = False

    def result(self) -> Result:
        return Result(
            cmd=self.cmd,
            exit_code=self.exit_code,
            stdout_bytes=decoded(self.stdout, self.encoding),
            stderr_bytes=decoded(self.stderr, self.encoding),
            duration_ms=self.duration_ms,
            truncated=self.truncated,
        )


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A command that runs in a sandbox."""

    pid: int
    cmd: str
    tag: str | None = None
    args: tuple[str, ...] = ()


class ProcessList(msgspec.Struct, frozen=True, kw_only=True):
    processes: tuple[Process, ...]


class LeftOut(msgspec.Struct, frozen=True):
    """A path that was not copied, and why."""

    path: str
    reason: str


class Copied(msgspec.Struct, frozen=True):
    """What became of a copy: of `left_out_count` paths that were left out `left_out` names some.

    `size` is of the files, in bytes. `into_directory`: it was put into the path that was given,
    not in its place.
    """

    entries: int
    size: int
    into_directory: bool = False
    left_out: tuple[LeftOut, ...] = ()
    left_out_count: int = 0


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file, directory or symlink of a sandbox, a link itself and not what it points at.

    `mode` holds the permission bits, `permissions` the same as `ls` shows them. `raw_path` is
    there where `path` is no UTF-8 and shows replacements; calls take it in its place.
    """

    name: str
    path: str
    type: Literal["file", "directory", "symlink"]
    size: int
    mode: int
    permissions: str
    owner: str
    group: str
    modified_at: datetime
    symlink_target: str | None = None
    raw_path: bytes | None = None


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    entries: tuple[FileEntry, ...]


class MadeDirectory(msgspec.Struct, frozen=True, kw_only=True):
    entry: FileEntry


class MetricsSample(msgspec.Struct, frozen=True, kw_only=True):
    """What a sandbox used around one moment; sizes are bytes, None where nobody can tell.

    `cpu_used_pct` is of all its CPUs. The network counts since the sandbox was created.
    """

    time: datetime
    cpu_count: int
    cpu_used_pct: float
    mem_total: int | None = None
    mem_used: int | None = None
    mem_cache: int | None = None
    disk_total: int | None = None
    disk_used: int | None = None
    net_received: int | None = None
    net_sent: int | None = None


class MetricsHistory(msgspec.Struct, frozen=True, kw_only=True):
    """Samples, oldest first, at most one for each `step_sec`; none while it did not run."""

    step_sec: int
    samples: tuple[MetricsSample, ...]


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a sandbox's console; any character may be in its `text`. `id` is a cursor."""

    id: str
    time: datetime
    source: Literal["console", "kernel", "agent", "host"]
    text: str


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """Lines in the direction that was asked for; the next ones are those from `cursor` on."""

    lines: tuple[LogLine, ...]
    cursor: str | None = None


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """Use of resources inside a sandbox now; memory and disk are bytes.

    `mem_limit` and `process_limit` are what all commands together may use, where that is bounded.
    `egress_denied` is how often the network policy refused a name, None where it has no names, and
    `egress_denied_names` are the last of those.
    """

    cpu_count: int
    cpu_used_pct: float
    mem_total: int
    mem_used: int
    disk_used: int
    disk_total: int
    mem_cache: int = 0
    mem_limit: int | None = None
    process_count: int | None = None
    process_limit: int | None = None
    egress_denied: int | None = None
    egress_denied_names: tuple[str, ...] = ()
