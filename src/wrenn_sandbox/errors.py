"""The one exception tree of the platform.

    WrennError
    ├── InvalidRequest          400 invalid_request
    ├── Unauthorized            401 unauthorized
    ├── Forbidden               403 forbidden
    ├── NotFound                404 not_found
    │   ├── ProviderNotFound    404 provider_not_found
    │   └── NotInGuest          404 not_found       the guest has no such file or command
    │       └── PortError       502 agent_error     the program on a port fails
    │           └── PortNotOpen 502 agent_error     nothing listens there
    ├── MethodNotAllowed        405 method_not_allowed
    ├── Conflict                409 conflict
    │   ├── InvalidState        409 invalid_state
    │   ├── AlreadyExists       409 already_exists
    │   ├── KeyReused           409 idempotency_key_reused
    │   └── EmailTaken          409 email_taken
    ├── LoginRefused            a login with a provider; the front end is told the code
    │   ├── AccessDenied        access_denied       refused at the provider or by this server
    │   ├── StateRefused        invalid_state
    │   ├── MissingCode         missing_code
    │   └── ExchangeFailed      exchange_failed     the provider does not say who it is
    ├── RequestTimeout          408 request_timeout
    ├── Gone                    410 gone            events that are not kept any more
    ├── TooLarge                413 too_large
    │   ├── UrlTooLong          414 too_large
    │   └── HeadTooLarge        431 too_large
    ├── RateLimited             429 rate_limited
    ├── QuotaExceeded           429 quota_exceeded
    ├── InternalError           500 internal_error
    ├── AgentError              502 agent_error
    │   ├── NotResponding       502 agent_error     the agent in the guest does not answer
    │   ├── HostFailure         502 agent_error     a VM, slot or disk operation failed
    │   └── IncompatibleImage   502 agent_error     a stored image does not fit this machine
    ├── NoCapacity              503 no_capacity
    ├── ExecTimeout             504 exec_timeout
    └── NoSpace                 507 no_space

`str(error)` is what a caller may read: it says what to do and never holds a host path, an
address or a traceback. `error.detail` is for the log only. `retry_after` is in seconds and
set where waiting helps.
"""

from collections.abc import Mapping


class WrennError(Exception):
    """Base of every error the platform raises on purpose."""

    code = "internal_error"
    status = 500

    def __init__(
        self, message: str, *, detail: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail
        self.retry_after = retry_after

    def add_detail(self, more: str | None) -> None:
        """Say more in the detail, after what it says already."""
        self.detail = "\n".join(each for each in (self.detail, more) if each) or None

    def extra(self) -> Mapping[str, str]:
        """Additional keys of the public error object."""
        return {}


class InvalidRequest(WrennError):
    code, status = "invalid_request", 400


class Unauthorized(WrennError):
    code, status = "unauthorized", 401


class Forbidden(WrennError):
    code, status = "forbidden", 403


class NotFound(WrennError):
    code, status = "not_found", 404


class ProviderNotFound(NotFound):
    code = "provider_not_found"


class NotInGuest(NotFound):
    """The sandbox is there, what was asked for inside it is not."""


class PortError(NotInGuest):
    """The program on a port of the guest does not answer, or not in HTTP."""

    code, status = "agent_error", 502


class PortNotOpen(PortError):
    """No program listens there."""


class MethodNotAllowed(WrennError):
    code, status = "method_not_allowed", 405


class Conflict(WrennError):
    code, status = "conflict", 409


class InvalidState(Conflict):
    code = "invalid_state"


class AlreadyExists(Conflict):
    code = "already_exists"


class KeyReused(Conflict):
    """An idempotency key came with another request than before."""

    code = "idempotency_key_reused"


class EmailTaken(Conflict):
    code = "email_taken"


class LoginRefused(WrennError):
    """A login with an OAuth provider came to nothing: the browser is sent on with the code."""

    status = 400


class AccessDenied(LoginRefused):
    code = "access_denied"


class StateRefused(LoginRefused):
    """The state is missing, forged, too old, another browser's or has been used."""

    code = "invalid_state"


class MissingCode(LoginRefused):
    code = "missing_code"


class ExchangeFailed(LoginRefused):
    """The provider gave no token, no profile or no verified primary email."""

    code = "exchange_failed"


class RequestTimeout(WrennError):
    """The client took too long to send its request."""

    code, status = "request_timeout", 408


class Gone(WrennError):
    """What was asked for was there and is not kept any more."""

    code, status = "gone", 410


class TooLarge(WrennError):
    code, status = "too_large", 413


class UrlTooLong(TooLarge):
    status = 414


class HeadTooLarge(TooLarge):
    status = 431


class RateLimited(WrennError):
    code, status = "rate_limited", 429


class QuotaExceeded(WrennError):
    """A limit of the caller's team is reached; carries the name of that limit."""

    code, status = "quota_exceeded", 429

    def __init__(self, message: str, *, limit: str, retry_after: float | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.limit = limit

    def extra(self) -> Mapping[str, str]:
        return {"limit": self.limit}


class InternalError(WrennError):
    pass


class AgentError(WrennError):
    code, status = "agent_error", 502


class NotResponding(AgentError):
    """The agent in the guest does not answer, and did not when it was asked some time ago."""


class HostFailure(AgentError):
    """A VM, network slot or disk operation on the host failed."""


class IncompatibleImage(AgentError):
    """A stored image was made by another VMM, CPU model or accelerator, or is damaged."""


class NoCapacity(WrennError):
    code, status = "no_capacity", 503


class ExecTimeout(WrennError):
    """The command hit its time limit; carries what it had written (text or base64)."""

    code, status = "exec_timeout", 504

    def __init__(
        self, message: str, *, stdout: str = "", stderr: str = "", encoding: str = "utf-8"
    ) -> None:
        super().__init__(message)
        self.stdout = stdout
        self.stderr = stderr
        self.encoding = encoding

    def extra(self) -> Mapping[str, str]:
        return {"stdout": self.stdout, "stderr": self.stderr, "encoding": self.encoding}


class NoSpace(WrennError):
    code, status = "no_space", 507
