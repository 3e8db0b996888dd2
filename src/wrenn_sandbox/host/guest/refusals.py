"""What a guest agent's refusals mean to whoever asked."""

import re
import shlex
from typing import Final

from wrenn_sandbox.errors import (
    AgentError,
    Conflict,
    InvalidRequest,
    NoSpace,
    NotInGuest,
    WrennError,
)
from wrenn_sandbox.wire.messages import Command

from .connect_rpc import RpcError

_NO_SPACE_STATUS = 507
_MEANING: dict[str, type[WrennError]] = {
    "not_found": NotInGuest,
    "invalid_argument": InvalidRequest,
    "permission_denied": InvalidRequest,
    "already_exists": Conflict,
    "failed_precondition": Conflict,
}


_SHELL: Final = re.compile(r"[\s|&;<>()$`*?]")
"""What makes a command line of a command's name."""

_LINE: Final = 256
"""Characters of a command line that is repeated to whoever sent it."""


def not_started(error: RpcError, command: Command) -> str:
    """Why a command could not be started; to a whole command line, how to have it run."""
    line = command.cmd
    if error.rpc_code != "not_found" or command.args or len(line) > _LINE:
        return error.message
    if not _SHELL.search(line):
        return error.message
    return f"{error.message}: commands run without a shell; use sh -c {shlex.quote(line)}"


def refusal(error: RpcError, status: int = 0) -> WrennError:
    """The platform's error for one of the agent's, given the HTTP status of an unary call."""
    if status == _NO_SPACE_STATUS:
        return NoSpace(error.message)
    return _MEANING.get(error.rpc_code, AgentError)(error.message)
