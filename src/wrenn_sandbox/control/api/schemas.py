"""The public shapes, named as in the contract. Absent values are left out of responses."""

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
from wrenn_sandbox.model.limits import EXEC_TIMEOUT_DEFAULT, EXEC_TIMEOUT_MAX, PASSWORD_MIN
from wrenn_sandbox.model.sandbox import Status
from wrenn_sandbox.model.template import TemplateType


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
OptionalArgument = Annotated[Argument | None, WithJsonSchema({"type": "string"})]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _Response(BaseModel):
    model_config = ConfigDict(frozen=True)


class SignupRequest(_Request):
    email: Annotated[str, Field(json_schema_extra={"format": "email"})]
    password: Annotated[str, Field(min_length=PASSWORD_MIN)]


class LoginRequest(_Request):
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


class CreateAPIKeyRequest(_Request):
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


class CreateSandboxRequest(_Request):
    """Memory in MiB; `timeout_sec` of inactivity pauses the sandbox, 0 never does."""

    template: str = "minimal"
    vcpus: Integer = 1
    memory_mb: Integer = 512
    timeout_sec: Integer = 0


class Sandbox(_Response):
    id: str
    status: Annotated[
        Status, WithJsonSchema({"type": "string", "enum": [status.value for status in Status]})
    ]
    template: str
    vcpus: int
    memory_mb: int
    timeout_sec: int
    guest_ip: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    host_ip: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    reason: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    created_at: datetime
    started_at: NullableTime = None
    last_active_at: NullableTime = None
    last_updated: datetime

    @classmethod
    def of(cls, sandbox: records.Sandbox) -> Self:
        return cls(
            id=sandbox.id,
            status=sandbox.status,
            template=sandbox.template,
            vcpus=sandbox.vcpus,
            memory_mb=sandbox.memory_mb,
            timeout_sec=sandbox.timeout_sec,
            guest_ip=sandbox.guest_ip,
            host_ip=sandbox.host_ip,
            reason=sandbox.reason,
            created_at=sandbox.created_at,
            started_at=sandbox.started_at,
            last_active_at=sandbox.last_active_at,
            last_updated=sandbox.last_updated,
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


class ExecRequest(_Request):
    """A command to run directly, without a shell; `timeout_sec` is 1 to 3600."""

    cmd: Annotated[Argument, StringConstraints(min_length=1)]
    args: list[Argument] = []
    timeout_sec: Annotated[Integer, Field(ge=1, le=EXEC_TIMEOUT_MAX)] = EXEC_TIMEOUT_DEFAULT
    envs: Annotated[dict[str, str], AfterValidator(_environment)] = {}
    cwd: OptionalArgument = None
    user: OptionalArgument = None


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


class CreateSnapshotRequest(_Request):
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


class ErrorDetail(BaseModel):
    """`code` is for programs, `message` says what to do; some codes add keys."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str


class Error(BaseModel):
    error: ErrorDetail
