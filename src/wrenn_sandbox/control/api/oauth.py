"""`/v1/auth/oauth`: login with a provider. For browsers: all but a refusal is a redirect."""

from typing import Annotated, Final

from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from wrenn_sandbox.control.oauth.registry import NAMES
from wrenn_sandbox.control.oauth.state import LIFETIME
from wrenn_sandbox.control.service.oauth import Arrival
from wrenn_sandbox.errors import ProviderNotFound, RateLimited

from .auth import attempted_from
from .errors import error_response
from .responses import failures
from .services import Services, ServicesDependency

router = APIRouter(prefix="/v1/auth/oauth", tags=["auth"])

_COOKIE: Final = "oauth_state"
_REDIRECT: Final[dict[int | str, dict[str, object]]] = {302: {"description": "On to another page"}}

ProviderName = Annotated[str, Path(json_schema_extra={"enum": list(NAMES)})]
Brought = Annotated[str | None, Query()]


def _set_cookie(response: Response, services: Services, value: str, seconds: int) -> None:
    response.set_cookie(
        _COOKIE,
        value,
        max_age=seconds,
        path=services.oauth.sites.cookie_path,
        secure=services.oauth.sites.is_secure,
        httponly=True,
        samesite="lax",
    )


@router.get(
    "/{provider}",
    operation_id="oauthRedirect",
    status_code=302,
    response_class=Response,
    responses={**_REDIRECT, **failures(404)},
)
async def begin(provider: ProviderName, services: ServicesDependency) -> Response:
    """Send a browser to its provider, which asks for consent and sends it back."""
    url, cookie = services.oauth.begin(provider)
    response = RedirectResponse(url, status_code=302)
    _set_cookie(response, services, cookie, int(LIFETIME.total_seconds()))
    return response


@router.get(
    "/{provider}/callback",
    operation_id="oauthCallback",
    status_code=302,
    response_class=Response,
    responses={**_REDIRECT, **failures(404, 429)},
)
async def callback(
    request: Request,
    provider: ProviderName,
    services: ServicesDependency,
    code: Brought = None,
    state: Brought = None,
    error: Brought = None,
) -> Response:
    """Log in the user of a browser that comes back, and send it on to the front end.

    There the query holds `token`, `user_id`, `team_id` and `email`, or `error`: `access_denied`,
    `invalid_state`, `missing_code`, `exchange_failed`, `email_taken` or `internal_error`.
    """
    arrival = Arrival(request.cookies.get(_COOKIE), state, code, error)
    try:
        url = await services.oauth.finish(provider, arrival, address=attempted_from(request))
    except (ProviderNotFound, RateLimited) as refusal:
        response = error_response(refusal)
    else:
        response = RedirectResponse(url, status_code=302)
    _set_cookie(response, services, "", 0)
    return response
