"""The data that crosses the seam: frozen, plain, the same in one process or over a network.

Sizes in bytes unless the name says `_mb` (MiB); times in seconds unless it says `_ms`;
points in time are timezone-aware UTC.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Annotated, ClassVar, Self

import msgspec

from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.ids import ImageId, OperationId, SandboxId
from wrenn_sandbox.model.network import InvalidPolicy, NetworkPolicy
from wrenn_sandbox.model.secrets import HeaderRule, Injection
from wrenn_sandbox.model.template import TemplateType

from .metrics import Path

GuestPath = Annotated[str, "bytes that are no UTF-8 are escaped"]
"""A path in a guest as Python has paths: `surrogateescape` stands for bytes that are no UTF-8."""


class HostInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What one machine is and has left."""

    driver: str
    accelerator: str
    network: str
    vmm_version: str
    sandboxes: int
    memory_total_mb: int
    memory_free_mb: int
    disk_free_mb: int


class BaseTemplate(msgspec.Struct, frozen=True, kw_only=True):
    """A template that the host itself holds; `size_bytes` counts allocated bytes."""

    type: ClassVar = TemplateType.BASE
    name: str
    image_id: ImageId
    vcpus: int
    memory_mb: int
    size_bytes: int
    created_at: datetime


class TemplateImage(msgspec.Struct, frozen=True, kw_only=True):
    """What a base template is made of, and the size of a sandbox for which nobody names one."""

    image_id: ImageId
    vcpus: int
    memory_mb: int


class Egress(msgspec.Struct, frozen=True, kw_only=True):
    """A network policy as it crosses the seam: ranges as CIDR, and in `allow` names after them.

    `secrets` refer to secrets and hold none; those go along as an `Injection`.
    """

    internet: bool = True
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    secrets: tuple[HeaderRule, ...] = ()

    @classmethod
    def of(cls, policy: NetworkPolicy) -> Self:
        return cls(
            internet=policy.internet,
            allow=(*map(str, policy.allow), *policy.names),
            deny=tuple(map(str, policy.deny)),
            secrets=policy.secrets,
        )

    def policy(self, injection: Injection | None = None) -> NetworkPolicy:
        """Raises `InvalidRequest`."""
        try:
            policy = NetworkPolicy.parse(
                internet=self.internet, allow=self.allow, deny=self.deny, secrets=self.secrets
            )
        except InvalidPolicy as error:
            raise InvalidRequest(f"network.{error}") from error
        return replace(policy, injection=injection)


class CreateSandbox(msgspec.Struct, frozen=True, kw_only=True):
    """Start a machine from an image. The operation's id makes a retry harmless."""

    sandbox_id: SandboxId
    operation_id: OperationId
    image_id: ImageId
    vcpus: int
    memory_mb: int
    network: Egress = Egress()
    injection: Injection | None = None
    """What it takes to follow the policy's rules for secrets."""
    envs: dict[str, str] = {}
    """What every command finds in its environment; may hold secrets."""


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where a running sandbox is reached.

    `rebooted` says why it was started from its disk, where its memory had been asked for. `path` is
    how it came to run, where this is the answer of the call that started it.
    """

    guest_ip: str
    host_ip: str
    rebooted: str = ""
    path: Path = Path.RESTORED


class ImageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A stored image; `size` counts allocated bytes."""

    image_id: ImageId
    vcpus: int
    memory_mb: int
    size: int
    created_at: datetime


class Phase(StrEnum):
    """What a host knows of a sandbox: what runs, and what is kept on disk."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"


class SandboxReport(msgspec.Struct, frozen=True, kw_only=True):
    sandbox_id: SandboxId
    phase: Phase
    busy: bool = False
    """An operation is under way: the phase may change at any moment."""
    disk_bytes: int | None = None
    """What it takes on the host's disk, allocated; None where that is not known now."""
    placement: Placement | None = None
    network: Egress | None = None
    """What holds for a running sandbox; None where the host cannot tell."""
    injection: str | None = None
    """The version of what it follows rules for secrets with; None where it has nothing."""


class EventKind(StrEnum):
    EXITED = "exited"
    """The machine of a running sandbox ended by itself; nothing of it is left."""
    STOPPED = "stopped"
    """The guest of a running sandbox stopped by itself; what it had on its disk is stored."""


class HostEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened without a request. `number` grows by one from event to event."""

    number: int
    sandbox_id: SandboxId
    kind: EventKind
    reason: str
    at: datetime


class HostEvents(msgspec.Struct, frozen=True, kw_only=True):
    """Events of one epoch, which is random and new with each start of the host."""

    epoch: str
    events: tuple[HostEvent, ...] = ()


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A command to run in the guest, directly and without a shell."""

    cmd: str
    args: tuple[str, ...] = ()
    envs: dict[str, str] = {}
    cwd: str | None = None
    user: str | None = None


class CommandResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended. Output beyond the limit is dropped and `truncated` is true.

    Where it has `timed_out`, `killed` says whether the guest has told that it killed it.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    duration_ms: int
    truncated: bool = False
    timed_out: bool = False
    killed: bool = False


class GuestMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Use of resources inside a guest, as its agent reports it; sizes in bytes.

    `mem_limit` and `process_limit` bound all commands together; None where nothing does. The host
    knows `egress_denied`, how often the guest was refused a name, and the last of those names. It
    counts from when the policy got names, anew in each VM; None without names.
    """

    cpu_count: int
    cpu_used_pct: float
    mem_total: int
    mem_used: int
    mem_cache: int
    disk_used: int
    disk_total: int
    mem_limit: int | None = None
    process_count: int | None = None
    process_limit: int | None = None
    egress_denied: int | None = None
    egress_denied_names: tuple[str, ...] = ()


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What a sandbox used around one moment, `time` in Unix seconds; sizes in bytes.

    `cpu_used_pct` is of all its CPUs, as the host measures it. Memory and disk are the guest's
    word, None where it did not answer. The network counts from the sandbox's first start on, None
    where the host does not see it.
    """

    time: int
    cpu_count: int
    cpu_used_pct: float
    mem_total: int | None = None
    mem_used: int | None = None
    mem_cache: int | None = None
    disk_total: int | None = None
    disk_used: int | None = None
    net_received: int | None = None
    net_sent: int | None = None


class Samples(msgspec.Struct, frozen=True, kw_only=True):
    """Samples, oldest first, one for each so many seconds at most."""

    step_sec: int
    samples: tuple[Sample, ...]


class LogSource(StrEnum):
    """Who seems to have written a line: all but the host's lines are the guest's word."""

    CONSOLE = "console"
    KERNEL = "kernel"
    AGENT = "agent"
    HOST = "host"


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a guest's console; `at` is when the host read it. Any text may be in it."""

    number: int
    at: datetime
    source: LogSource
    text: str


class FileType(StrEnum):
    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a guest, a symlink itself and not what it points at.

    `mode` holds the permission bits. Bytes of names that are no UTF-8 are replaced; `raw_path` is
    base64 of such a path then.
    """

    name: str
    path: str
    type: FileType
    size: int
    mode: int
    permissions: str
    owner: str
    group: str
    modified_at: datetime
    symlink_target: str | None = None
    raw_path: str | None = None


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """A path that was not copied, and why."""

    path: str
    reason: str


class Unpacked(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an archive: of `left_out_count` paths that were left out some are named.

    `size` is of the files in it, in bytes; `into_directory`: it was put into the path that was
    given, not in its place.
    """

    entries: int
    size: int = 0
    into_directory: bool = False
    left_out: tuple[LeftOut, ...] = ()
    left_out_count: int = 0


class TerminalSize(msgspec.Struct, frozen=True, kw_only=True):
    """In characters."""

    cols: int
    rows: int


class ProcessRef(msgspec.Struct, frozen=True, kw_only=True):
    """A command of a guest by its pid or, without one, the newest with this tag."""

    pid: int | None = None
    tag: str | None = None


class ProcessInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A command that runs in a guest."""

    pid: int
    cmd: str
    args: tuple[str, ...] = ()
    tag: str | None = None


class ProcessSignal(StrEnum):
    TERM = "SIGTERM"
    KILL = "SIGKILL"


class Channel(StrEnum):
    STDOUT = "stdout"
    STDERR = "stderr"
    TERMINAL = "pty"


class Output(msgspec.Struct, frozen=True, tag=True):
    """A piece of what a command wrote."""

    channel: Channel
    data: bytes


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The end of a command: its exit code, 128+n when signal n killed it.

    `duration_ms` is by the guest's clock, where its agent says so.
    """

    exit_code: int
    duration_ms: float | None = None


ProcessEvent = Output | Ended


@dataclass(frozen=True)
class FileContent:
    """A file being read: its size in bytes where it is known, and its bytes.

    `chunks` raises `AgentError` where the transfer breaks off.
    """

    size: int | None
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True)
class ProcessStream:
    """A command being followed; `Ended` is the last event.

    `pid` is None for a command that could not be started: its events say why. `events` raises
    `AgentError` where the connection to the guest breaks off.
    """

    pid: int | None
    events: AsyncIterator[ProcessEvent]
