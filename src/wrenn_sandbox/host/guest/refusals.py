"""What a guest agent's refusals mean to whoever asked."""

from wrenn_sandbox.errors import (
    AgentError,
    Conflict,
    InvalidRequest,
    NoSpace,
    NotInGuest,
    WrennError,
)

from .connect_rpc import RpcError

_NO_SPACE_STATUS = 507
_MEANING: dict[str, type[WrennError]] = {
    "not_found": NotInGuest,
    "invalid_argument": InvalidRequest,
    "permission_denied": InvalidRequest,
    "already_exists": Conflict,
    "failed_precondition": Conflict,
}


def refusal(error: RpcError, status: int = 0) -> WrennError:
    """The platform's error for one of the agent's, given the HTTP status of an unary call."""
    if status == _NO_SPACE_STATUS:
        return NoSpace(error.message)
    return _MEANING.get(error.rpc_code, AgentError)(error.message)
