"""The one exception tree of the agent; every class carries its Connect code and HTTP status.

AgentError
├── InvalidArgument, Unauthenticated, PermissionDenied, NotFound, AlreadyExists,
│   FailedPrecondition, ResourceExhausted, DeadlineExceeded, Unimplemented
└── refusals of the HTTP layer: MethodNotAllowed, RequestTimeout, PayloadTooLarge,
    UnsupportedMedia, RangeNotSatisfiable, HeadersTooLarge, NoSpace
Disconnected: the peer has gone, nobody is left to be told.
"""

from __future__ import annotations

import errno
import os


class AgentError(Exception):
    """A refusal or failure that is told to the caller; as it is where it has no better name."""

    code = "internal"
    status = 500

    @property
    def message(self) -> str:
        """What the caller reads; bytes of paths that are no UTF-8 are shown as `?`."""
        text = str(self.args[0]) if self.args else self.code
        return text.encode("utf-8", "replace").decode()


class InvalidArgument(AgentError):
    """The request itself is wrong."""

    code, status = "invalid_argument", 400


class Unauthenticated(AgentError):
    """No token, or not the right one."""

    code, status = "unauthenticated", 401


class PermissionDenied(AgentError):
    """The acting user may not do this, or a file is not executable."""

    code, status = "permission_denied", 403


class NotFound(AgentError):
    """File, process, watcher or command does not exist."""

    code, status = "not_found", 404


class AlreadyExists(AgentError):
    """What should be made is there already."""

    code, status = "already_exists", 409


class FailedPrecondition(AgentError):
    """Not possible in the present state of the thing addressed."""

    code, status = "failed_precondition", 412


class ResourceExhausted(AgentError):
    """A limit of the guest or of the agent is reached."""

    code, status = "resource_exhausted", 429


class DeadlineExceeded(AgentError):
    """`Connect-Timeout-Ms` has passed."""

    code, status = "deadline_exceeded", 504


class Unimplemented(AgentError):
    """A method or encoding that this agent does not speak."""

    code, status = "unimplemented", 501


class MethodNotAllowed(AgentError):
    """The path exists, the method does not."""

    code, status = "unimplemented", 405


class RequestTimeout(AgentError):
    """The client was too slow in sending its request."""

    code, status = "deadline_exceeded", 408


class PayloadTooLarge(AgentError):
    """A body or message over its limit."""

    code, status = "resource_exhausted", 413


class UnsupportedMedia(AgentError):
    """A content type or content encoding that is not spoken here."""

    code, status = "invalid_argument", 415


class RangeNotSatisfiable(AgentError):
    """The range lies outside of the file."""

    code, status = "invalid_argument", 416


class HeadersTooLarge(AgentError):
    """Request line and headers over 32 KiB."""

    code, status = "resource_exhausted", 431


class NoSpace(AgentError):
    """The guest's disk or quota is full."""

    code, status = "resource_exhausted", 507


class Disconnected(Exception):
    """The peer closed or broke the connection."""


_BY_ERRNO: dict[int, type[AgentError]] = {
    errno.ENOENT: NotFound,
    errno.ENOTDIR: NotFound,
    errno.EEXIST: AlreadyExists,
    errno.EACCES: PermissionDenied,
    errno.EPERM: PermissionDenied,
    errno.EROFS: PermissionDenied,
    errno.EISDIR: InvalidArgument,
    errno.ELOOP: InvalidArgument,
    errno.EINVAL: InvalidArgument,
    errno.ENAMETOOLONG: InvalidArgument,
    errno.E2BIG: InvalidArgument,
    errno.ESRCH: InvalidArgument,
    errno.ENXIO: InvalidArgument,
    errno.EXDEV: FailedPrecondition,
    errno.ETXTBSY: FailedPrecondition,
    errno.EBUSY: FailedPrecondition,
    errno.ENOTEMPTY: FailedPrecondition,
    errno.ENOTSUP: FailedPrecondition,
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EFBIG: NoSpace,
    errno.EAGAIN: ResourceExhausted,
    errno.ENOMEM: ResourceExhausted,
    errno.EMFILE: ResourceExhausted,
    errno.ENFILE: ResourceExhausted,
}


def from_os_error(error: OSError, what: str) -> AgentError:
    """Translate `error` for the caller; `what` names the thing it happened to."""
    kind = _BY_ERRNO.get(error.errno or 0, AgentError)
    return kind(f"{what}: {os.strerror(error.errno).lower() if error.errno else 'failed'}")
