"""Sign-up and login: with email and password, or by the word of a provider."""

from dataclasses import dataclass
from datetime import datetime

from email_validator import EmailNotValidError, validate_email

from wrenn_sandbox.control.store.records import Account, Identity
from wrenn_sandbox.errors import AccessDenied, EmailTaken, Forbidden, InvalidRequest, Unauthorized
from wrenn_sandbox.ids import TeamId, UserId, new_team_id, new_user_id
from wrenn_sandbox.model.limits import EMAIL_MAX, PASSWORD_MAX

from .callers import Caller
from .context import ControlContext
from .passwords import Passwords, check_password
from .rate_limits import AttemptLimits
from .tokens import Tokens


@dataclass(frozen=True, slots=True)
class Session:
    """A user who has just proved who they are, and their token."""

    token: str
    user_id: UserId
    team_id: TeamId
    email: str


def normal_email(text: str) -> str:
    """The form of an email in which it is kept; raises `InvalidRequest`."""
    text = text.strip()
    try:
        if len(text) > EMAIL_MAX:  # which would take the parser half a second for each MiB
            raise EmailNotValidError
        email = validate_email(text, check_deliverability=False, globally_deliverable=False)
    except (EmailNotValidError, UnicodeError) as error:
        raise InvalidRequest("email must be an email address such as ada@example.com") from error
    return email.normalized.lower()


class AccountService:
    """Where sign-up is closed people log in to the accounts that there are, and make none."""

    def __init__(
        self,
        context: ControlContext,
        passwords: Passwords,
        tokens: Tokens,
        limits: AttemptLimits,
    ) -> None:
        self._store = context.store.accounts
        self._passwords = passwords
        self._tokens = tokens
        self._limits = limits
        self._signup_open = context.settings.signup == "open"
        self._clock = context.clock

    async def signup(self, email: str, password: str, *, address: str) -> Session:
        """Make a user with a team of their own; raises `EmailTaken`, `InvalidRequest`.

        Raises `Forbidden` where sign-up is closed, without a look at the email.
        """
        if not self._signup_open:
            await self._limits.attempt_from(address)
            raise Forbidden("Sign-up is closed here; ask whoever runs this server for an account")
        email = normal_email(email)
        check_password(password)
        await self._limits.attempt(email=email, address=address)
        hashed = await self._passwords.hash(password)
        account = Account(new_user_id(), new_team_id(), email, hashed)
        await self._store.create(account, self._clock())
        return self._session(account, self._clock())

    async def login(self, email: str, password: str, *, address: str) -> Session:
        """Raises the same `Unauthorized`, after the same time, whatever is wrong."""
        try:
            email = normal_email(email)
        except InvalidRequest:
            email = ""
        await self._limits.attempt(email=email, address=address)
        begun = self._clock()
        account = await self._store.by_email(email)
        hashed = None if account is None else account.password_hash
        fits = await self._passwords.verify(hashed, password[: PASSWORD_MAX + 1])
        if account is None or not fits or account.disabled_at is not None:
            raise Unauthorized("Wrong email or password")
        return self._session(account, begun)

    async def login_with_identity(self, identity: Identity, email: str) -> Session:
        """Log in whoever a provider has named; who is new gets a user and a team of their own.

        `email` is one that the provider has verified, in its normal form. An account that has it
        already is another's until its owner says otherwise: raises `EmailTaken`. Raises
        `AccessDenied` for a disabled user, and where sign-up is closed for who is new.
        """
        begun = self._clock()
        account = await self._store.by_identity(identity)
        if account is None:
            if not self._signup_open:
                raise AccessDenied("Sign-up is closed here", detail="sign-up is closed")
            account = Account(new_user_id(), new_team_id(), email, None)
            try:
                await self._store.create(account, begun, identity)
            except EmailTaken:
                # perhaps by this very identity, which logs in twice at the same time
                account = await self._store.by_identity(identity)
                if account is None:
                    raise
        if account.disabled_at is not None:
            raise AccessDenied("This user is disabled", detail="the user is disabled")
        return self._session(account, begun)

    def _session(self, account: Account, at: datetime) -> Session:
        token = self._tokens.issue(account, at)
        return Session(token, account.user_id, account.team_id, account.email)

    async def caller_of_token(self, token: str) -> Caller:
        """Whom a token acts for, as long as it counts; raises `Unauthorized`."""
        claims = self._tokens.read(token)
        if not await self._store.may_act(claims.user_id, claims.team_id, claims.issued_at):
            raise Unauthorized("The token is no longer valid; log in again")
        return Caller(claims.team_id, claims)
