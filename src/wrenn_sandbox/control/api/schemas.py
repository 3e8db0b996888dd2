"""The public shapes, named as in the contract. Absent values are left out of responses."""

import re
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
)

from wrenn_sandbox.control.service import templates
from wrenn_sandbox.control.service.accounts import Session
from wrenn_sandbox.control.service.sandboxes import Executed
from wrenn_sandbox.control.store import records
from wrenn_sandbox.model import network
from wrenn_sandbox.model.limits import EXEC_TIMEOUT_DEFAULT, EXEC_TIMEOUT_MAX, PASSWORD_MIN
from wrenn_sandbox.model.sandbox import Status
from wrenn_sandbox.model.template import TemplateType
from wrenn_sandbox.wire import messages
from wrenn_sandbox.wire.messages import FileType

_TAG = re.compile(r"[A-Za-z0-9._-]{1,64}")


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _without_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


def _environment(value: dict[str, str]) -> dict[str, str]:
    for name, content in value.items():
        if not name or "=" in name or "\0" in name or "\0" in content:
            raise ValueError("names must be neither empty nor hold = or NUL, values no NUL")
    return value


def _tag(value: str) -> str:
    if not _TAG.fullmatch(value) or value.isdigit():
        raise ValueError("must be 1 to 64 letters, digits, '.', '_' or '-', and not digits only")
    return value


Integer = Annotated[int, BeforeValidator(_whole)]
"""A JSON number without a fraction, whether written 1 or 1.0."""

Argument = Annotated[str, AfterValidator(_without_nul)]
"""Text that a program can be given."""

NullableTime = Annotated[
    datetime | None,
    WithJsonSchema({"type": "string", "format": "date-time", "nullable": True}),
]
NullableText = Annotated[str | None, WithJsonSchema({"type": "string", "nullable": True})]
NullableInteger = Annotated[int | None, WithJsonSchema({"type": "integer", "nullable": True})]
Environment = Annotated[dict[str, str], AfterValidator(_environment)]
"""Environment variables that a program can be given."""

Tag = Annotated[str, AfterValidator(_tag)]
"""A caller's name for a command."""

OptionalArgument = Annotated[Argument | None, WithJsonSchema({"type": "string"})]


class Request(BaseModel):
    """What callers send; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _Response(BaseModel):
    model_config = ConfigDict(frozen=True)


class SignupRequest(Request):
    email: Annotated[str, Field(json_schema_extra={"format": "email"})]
    password: Annotated[str, Field(min_length=PASSWORD_MIN)]


class LoginRequest(Request):
    email: Annotated[str, Field(json_schema_extra={"format": "email"})]
    password: str


class AuthResponse(_Response):
    token: str
    user_id: str
    team_id: str
    email: str

    @classmethod
    def of(cls, session: Session) -> Self:
        account = session.account
        return cls(
            token=session.token,
            user_id=account.user_id,
            team_id=account.team_id,
            email=account.email,
        )


class CreateAPIKeyRequest(Request):
    name: Annotated[Argument, StringConstraints(max_length=200)] = "Unnamed API Key"


class APIKeyResponse(_Response):
    """`key` is there only in the answer to its creation: it is not kept."""

    id: str
    team_id: str
    name: str
    key_prefix: str
    created_at: datetime
    last_used: NullableTime = None
    key: NullableText = None

    @classmethod
    def of(cls, key: records.ApiKey, secret: str | None = None) -> Self:
        return cls(
            id=key.id,
            team_id=key.team_id,
            name=key.name,
            key_prefix=key.key_prefix,
            created_at=key.created_at,
            last_used=key.last_used,
            key=secret,
        )


Cidrs = Annotated[
    list[str],
    Field(max_length=network.MAX_RANGES, json_schema_extra={"example": ["203.0.113.0/24"]}),
]
"""IPv4 ranges and addresses."""


class NetworkPolicy(Request):
    """What a sandbox reaches: `allow` wins over `deny`, and both over `internet`.

    Without `internet` there is no DNS either. This machine, other sandboxes and private, link-local
    and special ranges are closed whatever a policy says.
    """

    internet: bool = True
    allow: Cidrs = []
    deny: Cidrs = []

    @classmethod
    def of(cls, policy: network.NetworkPolicy) -> Self:
        return cls(
            internet=policy.internet,
            allow=[str(each) for each in policy.allow],
            deny=[str(each) for each in policy.deny],
        )

    def egress(self) -> messages.Egress:
        return messages.Egress(
            internet=self.internet, allow=tuple(self.allow), deny=tuple(self.deny)
        )


class CreateSandboxRequest(Request):
    """Memory in MiB; `timeout_sec` of inactivity pauses the sandbox, 0 never does."""

    template: str = "minimal"
    vcpus: Integer = 1
    memory_mb: Integer = 512
    timeout_sec: Integer = 0
    network: NetworkPolicy = NetworkPolicy()


class Sandbox(_Response):
    id: str
    status: Annotated[
        Status, WithJsonSchema({"type": "string", "enum": [status.value for status in Status]})
    ]
    template: str
    vcpus: int
    memory_mb: int
    timeout_sec: int
    network: NetworkPolicy
    guest_ip: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    host_ip: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    reason: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    created_at: datetime
    started_at: NullableTime = None
    last_active_at: NullableTime = None
    last_updated: datetime
    disk_bytes: Annotated[int, Field(json_schema_extra={"format": "int64"})]

    @classmethod
    def of(cls, sandbox: records.Sandbox) -> Self:
        return cls(
            id=sandbox.id,
            status=sandbox.status,
            template=sandbox.template,
            vcpus=sandbox.vcpus,
            memory_mb=sandbox.memory_mb,
            timeout_sec=sandbox.timeout_sec,
            network=NetworkPolicy.of(sandbox.network),
            guest_ip=sandbox.guest_ip,
            host_ip=sandbox.host_ip,
            reason=sandbox.reason,
            created_at=sandbox.created_at,
            started_at=sandbox.started_at,
            last_active_at=sandbox.last_active_at,
            last_updated=sandbox.last_updated,
            disk_bytes=sandbox.disk_bytes,
        )


class SandboxEvent(_Response):
    """One transition of a sandbox. `from` is absent for its creation."""

    event: str
    from_state: Annotated[
        str | None,
        Field(serialization_alias="from"),
        WithJsonSchema({"type": "string", "nullable": True}),
    ] = None
    to_state: Annotated[str, Field(serialization_alias="to")]
    reason: NullableText = None
    actor: str
    time: datetime

    @classmethod
    def of(cls, event: records.SandboxEvent) -> Self:
        return cls(
            event=event.event,
            from_state=event.from_state,
            to_state=event.to_state,
            reason=event.reason,
            actor=event.actor,
            time=event.at,
        )


class ExecRequest(Request):
    """A command to run directly, without a shell; `timeout_sec` is 1 to 3600."""

    cmd: Annotated[Argument, StringConstraints(min_length=1)]
    args: list[Argument] = []
    timeout_sec: Annotated[Integer, Field(ge=1, le=EXEC_TIMEOUT_MAX)] = EXEC_TIMEOUT_DEFAULT
    envs: Environment = {}
    cwd: OptionalArgument = None
    user: OptionalArgument = None
    background: bool = False
    tag: Annotated[Tag | None, WithJsonSchema({"type": "string"})] = None


class BackgroundExecResponse(_Response):
    """A command that runs on; `tag` names it as well as `pid` does."""

    sandbox_id: str
    cmd: str
    pid: int
    tag: str


class Process(_Response):
    pid: int
    tag: NullableText = None
    cmd: str
    args: list[str]


class ProcessList(_Response):
    processes: list[Process]

    @classmethod
    def of(cls, processes: list[messages.ProcessInfo]) -> Self:
        return cls(
            processes=[
                Process(pid=each.pid, tag=each.tag, cmd=each.cmd, args=list(each.args))
                for each in processes
            ]
        )


class SandboxMetrics(_Response):
    """Use of resources inside a sandbox now; sizes in bytes."""

    cpu_count: int
    cpu_used_pct: float
    mem_total: int
    mem_used: int
    mem_cache: int
    disk_used: int
    disk_total: int

    @classmethod
    def of(cls, metrics: messages.GuestMetrics) -> Self:
        return cls(
            cpu_count=metrics.cpu_count,
            cpu_used_pct=metrics.cpu_used_pct,
            mem_total=metrics.mem_total,
            mem_used=metrics.mem_used,
            mem_cache=metrics.mem_cache,
            disk_used=metrics.disk_used,
            disk_total=metrics.disk_total,
        )


class ExecResponse(_Response):
    sandbox_id: str
    cmd: str
    stdout: str
    stderr: str
    exit_code: int
    duration_ms: int
    encoding: Literal["utf-8", "base64"]
    truncated: bool

    @classmethod
    def of(cls, sandbox_id: str, cmd: str, executed: Executed) -> Self:
        output = executed.output
        return cls(
            sandbox_id=sandbox_id,
            cmd=cmd,
            stdout=output.stdout,
            stderr=output.stderr,
            exit_code=executed.exit_code,
            duration_ms=executed.duration_ms,
            encoding="base64" if output.encoding == "base64" else "utf-8",
            truncated=executed.truncated,
        )


class CreateSnapshotRequest(Request):
    sandbox_id: str
    name: Annotated[str | None, WithJsonSchema({"type": "string"})] = None


class Template(_Response):
    name: str
    type: Annotated[
        TemplateType,
        WithJsonSchema({"type": "string", "enum": [each.value for each in TemplateType]}),
    ]
    vcpus: NullableInteger = None
    memory_mb: NullableInteger = None
    size_bytes: Annotated[int, Field(json_schema_extra={"format": "int64"})]
    created_at: datetime

    @classmethod
    def of(cls, template: templates.Template) -> Self:
        return cls(
            name=template.name,
            type=template.type,
            vcpus=template.vcpus,
            memory_mb=template.memory_mb,
            size_bytes=template.size_bytes,
            created_at=template.created_at,
        )


class ReadFileRequest(Request):
    path: str


class ListFilesRequest(Request):
    """`depth` levels of directories are shown."""

    path: str
    depth: Annotated[Integer, Field(ge=1, le=64)] = 1


class MakeDirectoryRequest(Request):
    path: str


class RemoveFileRequest(Request):
    path: str


class FileEntry(_Response):
    """A symlink is described itself. `raw_path` is base64 of a path that is no UTF-8."""

    name: str
    path: str
    type: Annotated[
        FileType, WithJsonSchema({"type": "string", "enum": [each.value for each in FileType]})
    ]
    size: int
    mode: int
    permissions: str
    owner: str
    group: str
    modified_at: datetime
    symlink_target: NullableText = None
    raw_path: NullableText = None

    @classmethod
    def of(cls, entry: messages.FileEntry) -> Self:
        return cls(
            name=entry.name,
            path=entry.path,
            type=entry.type,
            size=entry.size,
            mode=entry.mode,
            permissions=entry.permissions,
            owner=entry.owner,
            group=entry.group,
            modified_at=entry.modified_at,
            symlink_target=entry.symlink_target,
            raw_path=entry.raw_path,
        )


class DirectoryListing(_Response):
    entries: list[FileEntry]

    @classmethod
    def of(cls, entries: list[messages.FileEntry]) -> Self:
        return cls(entries=[FileEntry.of(entry) for entry in entries])


class MakeDirectoryResponse(_Response):
    entry: FileEntry

    @classmethod
    def of(cls, entry: messages.FileEntry) -> Self:
        return cls(entry=FileEntry.of(entry))


class ErrorDetail(BaseModel):
    """`code` is for programs, `message` says what to do; some codes add keys."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str


class Error(BaseModel):
    error: ErrorDetail
