"""What the routes say of their failures in OpenAPI."""

from pydantic import BaseModel, ConfigDict

from wrenn_sandbox.errors import (
    AgentError,
    Conflict,
    ExecTimeout,
    Forbidden,
    InvalidRequest,
    NoCapacity,
    NoSpace,
    NotFound,
    RateLimited,
    TooLarge,
    Unauthorized,
    WrennError,
)

_MEANING: dict[type[WrennError], str] = {
    InvalidRequest: "The body, a field or a query value is not acceptable",
    Unauthorized: "The credential is missing or not valid",
    Forbidden: "The credential or the server does not allow this",
    NotFound: "There is no such thing, or it belongs to another team",
    Conflict: "The state of things does not allow this",
    TooLarge: "The body is too large",
    RateLimited: "Too many attempts, or a limit of the team is reached",
    AgentError: "The host or the agent in the guest failed",
    NoCapacity: "The host is full or shutting down",
    NoSpace: "The disk of the sandbox is full",
    ExecTimeout: "The command hit its time limit; error.stdout and error.stderr hold its output",
}


def failures(*statuses: int) -> dict[int | str, dict[str, object]]:
    """The `responses` of a route that may fail with these statuses."""
    meanings = {error.status: text for error, text in _MEANING.items()}
    return {
        status: {"model": Error, "description": meanings[status]} for status in sorted(statuses)
    }


class ErrorDetail(BaseModel):
    """`code` is for programs, `message` says what to do; some codes add keys."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str


class Error(BaseModel):
    error: ErrorDetail
