"""What clients say on the WebSockets of commands; see `docs/websockets.md`."""

import base64
import binascii
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from wrenn_sandbox.control.api.fields import (
    Argument,
    Environment,
    Integer,
    OptionalArgument,
    RequestModel,
    Tag,
)
from wrenn_sandbox.wire.messages import Command, TerminalSize

from .websocket import Malformed

Side = Annotated[Integer, Field(ge=1, le=65535)]
"""Columns or rows of a terminal."""


def _decoded(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("must be base64 text")
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError("must be base64") from error


class StartMessage(RequestModel):
    """The command of an exec stream; `tty` runs it on a terminal of `cols` x `rows`."""

    type: Literal["start"]
    cmd: Annotated[Argument, StringConstraints(min_length=1)]
    args: tuple[Argument, ...] = ()
    envs: Environment = Field(default_factory=dict)
    cwd: OptionalArgument = None
    user: OptionalArgument = None
    tty: bool = False
    cols: Side = 80
    rows: Side = 24

    @property
    def command(self) -> Command:
        return Command(cmd=self.cmd, args=self.args, envs=self.envs, cwd=self.cwd, user=self.user)

    @property
    def terminal(self) -> TerminalSize | None:
        return TerminalSize(cols=self.cols, rows=self.rows) if self.tty else None


class StdinMessage(RequestModel):
    type: Literal["stdin"]
    data: str
    encoding: Literal["utf-8", "base64"] = "utf-8"

    @property
    def content(self) -> bytes:
        """The input that is meant; raises `Malformed`."""
        if self.encoding == "utf-8":
            return self.data.encode("utf-8")
        try:
            return base64.b64decode(self.data, validate=True)
        except binascii.Error as error:
            raise Malformed("data: must be base64") from error


class StdinCloseMessage(RequestModel):
    type: Literal["stdin_close"]


class ResizeMessage(RequestModel):
    type: Literal["resize"]
    cols: Side
    rows: Side


class StopMessage(RequestModel):
    """End the process group, with SIGTERM first."""

    type: Literal["stop"]


class PongMessage(RequestModel):
    """What clients answer to a `ping` frame; it may come at any time."""

    type: Literal["pong"]


class PtyStartMessage(RequestModel):
    """A new terminal; without a command it runs a login shell."""

    type: Literal["start"]
    cmd: Annotated[Argument, StringConstraints(min_length=1)] | None = None
    args: tuple[Argument, ...] = ()
    envs: Environment = Field(default_factory=dict)
    cwd: OptionalArgument = None
    user: OptionalArgument = None
    tag: Tag | None = None
    cols: Side = 80
    rows: Side = 24

    @property
    def command(self) -> Command:
        shell = self.cmd is None
        return Command(
            cmd=self.cmd or "/bin/bash",
            args=("-i", "-l") if shell and not self.args else self.args,
            envs=self.envs,
            cwd=self.cwd,
            user=self.user,
        )


class PtyConnectMessage(RequestModel):
    type: Literal["connect"]
    tag: Annotated[str, StringConstraints(min_length=1)]


class PtyInputMessage(RequestModel):
    type: Literal["input"]
    data: Annotated[bytes, BeforeValidator(_decoded)]


class KillMessage(RequestModel):
    """End the process group at once."""

    type: Literal["kill"]
