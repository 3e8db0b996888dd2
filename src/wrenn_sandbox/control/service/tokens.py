"""JSON Web Tokens of logged-in users: HS256, six hours."""

import os
import secrets
import tempfile
import warnings
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import structlog

from wrenn_sandbox.control.clock import Clock
from wrenn_sandbox.control.store.records import Account
from wrenn_sandbox.errors import HostFailure, Unauthorized
from wrenn_sandbox.ids import TeamId, UserId, is_id
from wrenn_sandbox.settings import SECRET_MIN

_log = structlog.get_logger(__name__)
LIFETIME = timedelta(hours=6)
_ALGORITHM = "HS256"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CLAIMS = ("sub", "team_id", "email", "iat", "exp")


@dataclass(frozen=True, slots=True)
class Claims:
    user_id: UserId
    team_id: TeamId
    issued_at: datetime


class Tokens:
    """Issues and reads tokens signed with one secret."""

    def __init__(self, secret: str, clock: Clock) -> None:
        self._secret = secret.encode("utf-8")
        self._clock = clock

    def issue(self, account: Account, at: datetime) -> str:
        """A token of this time, though never older than what its user's tokens must be.

        `at` is before `account` was read: what has revoked tokens since then revokes this one too.
        """
        now = max(at, account.tokens_not_before or _EPOCH)
        claims = {
            "sub": account.user_id,
            "team_id": account.team_id,
            "email": account.email,
            "iat": int(now.timestamp()),
            "exp": int((now + LIFETIME).timestamp()),
        }
        with warnings.catch_warnings(action="ignore", category=jwt.InsecureKeyLengthWarning):
            return jwt.encode(claims, self._secret, algorithm=_ALGORITHM)

    def read(self, token: str) -> Claims:
        """The claims of a valid token; raises `Unauthorized` for any other."""
        try:
            with warnings.catch_warnings(action="ignore", category=jwt.InsecureKeyLengthWarning):
                claims = jwt.decode(
                    token,
                    self._secret,
                    algorithms=[_ALGORITHM],
                    options={"require": list(_CLAIMS), "verify_exp": False, "verify_iat": False},
                )
        except (jwt.InvalidTokenError, ValueError, RecursionError) as error:
            raise Unauthorized("The token is not valid; log in again") from error
        user_id, team_id = claims["sub"], claims["team_id"]
        issued, expiry = claims["iat"], claims["exp"]
        if not (isinstance(user_id, str) and isinstance(team_id, str)):
            raise Unauthorized("The token is not valid; log in again")
        if not (is_id("usr", user_id) and is_id("team", team_id)):
            raise Unauthorized("The token is not valid; log in again")
        if not isinstance(expiry, int | float) or self._clock().timestamp() >= expiry:
            raise Unauthorized("The token has expired; log in again")
        try:
            issued_at = datetime.fromtimestamp(issued, UTC)
        except (TypeError, ValueError, OverflowError, OSError) as error:
            raise Unauthorized("The token is not valid; log in again") from error
        return Claims(UserId(user_id), TeamId(team_id), issued_at)


def load_or_make_secret(path: Path, lost: str = "which logs everyone out") -> str:
    """The secret kept in a file of mode 0600; the first of several servers makes it.

    Blocks: the file is written in full and synced before it gets its name. A file that others may
    read is closed to them, with a warning. Raises `HostFailure` where that is not possible, where
    it cannot be read, and where it holds less than `SECRET_MIN` characters. `lost` says what it
    means to have another one.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_urlsafe(48))
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            Path(temporary).unlink()
    try:
        return _kept_secret(path, lost)
    except (OSError, UnicodeDecodeError) as error:
        raise HostFailure(
            f"The file {path.name} in the data directory must be the server's own and hold text",
            detail=str(error),
        ) from error


def _kept_secret(path: Path, lost: str) -> str:
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
        _log.warning(
            f"{path.name} could be read by others and is closed now; if they may have read it, "
            f"remove it and start again, {lost}"
        )
    secret = path.read_text(encoding="ascii")
    if len(secret.strip()) < SECRET_MIN:
        raise HostFailure(
            f"The file {path.name} in the data directory holds less than {SECRET_MIN} characters: "
            f"remove it to have a new one made, {lost}"
        )
    return secret
