"""Commands: `/v1/sandboxes/{id}/exec`."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, WithJsonSchema

from wrenn_sandbox.control.service.guests import Executed
from wrenn_sandbox.model.limits import EXEC_TIMEOUT_DEFAULT, EXEC_TIMEOUT_MAX

from .fields import Argument, Environment, Integer, OptionalArgument, Request, Response, Tag


class ExecRequest(Request):
    """A command to run directly, without a shell; `timeout_sec` is 1 to 3600."""

    cmd: Annotated[Argument, StringConstraints(min_length=1)]
    args: list[Argument] = Field([])
    timeout_sec: Annotated[Integer, Field(ge=1, le=EXEC_TIMEOUT_MAX)] = EXEC_TIMEOUT_DEFAULT
    envs: Environment = Field({})
    cwd: OptionalArgument = None
    user: OptionalArgument = None
    background: bool = False
    tag: Annotated[Tag | None, WithJsonSchema({"type": "string"})] = None


class ExecResponse(Response):
    sandbox_id: str
    cmd: str
    stdout: str
    stderr: str
    exit_code: int
    duration_ms: int
    encoding: Literal["utf-8", "base64"]
    truncated: bool

    @classmethod
    def from_execution(cls, sandbox_id: str, cmd: str, executed: Executed) -> Self:
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


class BackgroundExecResponse(Response):
    """A command that runs on; `tag` names it as well as `pid` does."""

    sandbox_id: str
    cmd: str
    pid: int
    tag: str
