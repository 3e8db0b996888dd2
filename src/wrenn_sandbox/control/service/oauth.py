"""Login with a provider: the way of a browser there and back."""

import asyncio
import contextlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final
from urllib.parse import urlencode, urlsplit

import structlog

from wrenn_sandbox.control.oauth.http import failed
from wrenn_sandbox.control.oauth.provider import Provider
from wrenn_sandbox.control.oauth.state import Proven, States
from wrenn_sandbox.control.store.records import Identity
from wrenn_sandbox.errors import (
    AccessDenied,
    EmailTaken,
    ExchangeFailed,
    InvalidRequest,
    LoginRefused,
    MissingCode,
    ProviderNotFound,
    StateRefused,
)

from .accounts import AccountService, Session, normal_email
from .context import ControlContext
from .rate_limits import AttemptLimits

_log = structlog.get_logger(__name__)
_ROUTES: Final = "/v1/auth/oauth"
_INTERNAL: Final = "internal_error"
_ERROR_NAME: Final = re.compile(r"[a-z_]{1,64}")


@dataclass(frozen=True, slots=True)
class Sites:
    """Where browsers find this server and its front end; neither ends with a slash."""

    server: str
    front_end: str

    @property
    def cookie_path(self) -> str:
        """The routes of this login as browsers see them."""
        return urlsplit(self.server).path + _ROUTES

    @property
    def is_secure(self) -> bool:
        return urlsplit(self.server).scheme == "https"

    def callback(self, provider: str) -> str:
        """Where a provider sends browsers back to."""
        return f"{self.server}{_ROUTES}/{provider}/callback"

    def end(self, provider: str, query: Mapping[str, str]) -> str:
        """The page of the front end that is told how a login ended."""
        return f"{self.front_end}/auth/{provider}/callback?{urlencode(query)}"


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a browser brought back; `error`, `code` and `state` come from its address line."""

    cookie: str | None
    state: str | None
    code: str | None
    error: str | None


class OAuthService:
    def __init__(
        self,
        context: ControlContext,
        accounts: AccountService,
        limits: AttemptLimits,
        providers: Mapping[str, Provider],
        states: States,
    ) -> None:
        settings = context.settings
        self.sites = Sites(settings.public_url or "", settings.oauth_redirect_url or "")
        self._timeout = settings.oauth_timeout_sec
        self._spent = context.store.spent_states
        self._accounts = accounts
        self._limits = limits
        self._providers = providers
        self._states = states
        self._clock = context.clock

    def begin(self, name: str) -> tuple[str, str]:
        """Where a browser goes, and the cookie that it takes along; raises `ProviderNotFound`."""
        provider = self._provider(name)
        issued = self._states.issue(name)
        url = provider.authorization_url(
            redirect_uri=self.sites.callback(name), state=issued.state, challenge=issued.challenge
        )
        return url, issued.cookie

    async def finish(self, name: str, arrival: Arrival, *, address: str) -> str:
        """Where the browser goes: to the front end, with a token or the code of what is wrong.

        Raises `ProviderNotFound` and `RateLimited`.
        """
        provider = self._provider(name)
        await self._limits.attempt_from(address)
        try:
            session = await self._login(provider, arrival)
        except (LoginRefused, EmailTaken) as refusal:
            _log.info("login refused", provider=name, code=refusal.code, why=refusal.detail)
            return self.sites.end(name, {"error": refusal.code})
        except Exception:
            _log.exception("login failed", provider=name)
            return self.sites.end(name, {"error": _INTERNAL})
        _log.info("login", provider=name, user_id=session.user_id)
        return self.sites.end(name, asdict(session))

    def _provider(self, name: str) -> Provider:
        provider = self._providers.get(name)
        if provider is None:
            raise ProviderNotFound("This server has no such login provider")
        return provider

    async def _login(self, provider: Provider, arrival: Arrival) -> Session:
        if arrival.error is not None:
            with contextlib.suppress(StateRefused):
                await self._prove(provider.name, arrival)
            known = _ERROR_NAME.fullmatch(arrival.error)
            said = arrival.error if known else "an error of no known form"
            raise AccessDenied("The provider refused the login", detail=f"the provider said {said}")
        proven = await self._prove(provider.name, arrival)
        if not arrival.code:
            raise MissingCode("The provider sent no code")
        try:
            async with asyncio.timeout(self._timeout):
                profile = await provider.profile(
                    code=arrival.code,
                    redirect_uri=self.sites.callback(provider.name),
                    verifier=proven.verifier,
                )
        except TimeoutError:
            raise failed("too slow") from None
        try:
            email = normal_email(profile.email)
        except InvalidRequest as error:
            raise ExchangeFailed(str(error), detail="the email is no address") from error
        identity = Identity(provider.name, profile.subject)
        return await self._accounts.login_with_identity(identity, email)

    async def _prove(self, name: str, arrival: Arrival) -> Proven:
        """Use up the state that the browser brought; raises `StateRefused`."""
        proven = self._states.check(name, arrival.cookie, arrival.state)
        if not await self._spent.spend(proven.state, proven.expires_at, self._clock()):
            raise StateRefused("This login has already been completed", detail="state used before")
        return proven
