"""Who asks: the team behind an API key or a token.

When a request carries both, the API key decides and the token is not looked at: a request acts
for exactly one credential, and a deleted key is refused even beside a valid token.
"""

from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.requests import HTTPConnection

from wrenn_sandbox.control.service.callers import Caller
from wrenn_sandbox.errors import Unauthorized
from wrenn_sandbox.ids import KEY_PREFIXES, TeamId

from .services import Services, ServicesDependency

_api_key = APIKeyHeader(name="X-API-Key", scheme_name="apiKeyAuth", auto_error=False)
_bearer = HTTPBearer(bearerFormat="JWT", scheme_name="bearerAuth", auto_error=False)

# Parameters of these types say in OpenAPI what a route needs; the headers are read below.
_ApiKey = Annotated[object, Security(_api_key)]
_Bearer = Annotated[object, Security(_bearer)]


def _bearer_token(connection: HTTPConnection) -> str | None:
    header = connection.headers.get("authorization")
    if header is None:
        return None
    scheme, _, token = header.strip().partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized("Send the token as Authorization: Bearer TOKEN")
    return token.strip()


async def _team_of_token(
    connection: HTTPConnection, services: ServicesDependency, _: _Bearer
) -> TeamId:
    token = _bearer_token(connection)
    if token is None:
        raise Unauthorized("Log in and send the token as Authorization: Bearer TOKEN")
    return (await services.accounts.caller_of_token(token)).team_id


async def caller_of_connection(connection: HTTPConnection, services: Services) -> Caller:
    """Who is behind the headers of a request; raises `Unauthorized`."""
    key = connection.headers.get("x-api-key")
    if key is not None:
        return await services.api_keys.caller_of_key(key.strip())
    token = _bearer_token(connection)
    if token is None:
        raise Unauthorized("Send an API key as X-API-Key, or a token as Authorization: Bearer")
    return await services.accounts.caller_of_token(token)


async def _caller_by_either(
    connection: HTTPConnection, services: ServicesDependency, _: _ApiKey, __: _Bearer
) -> Caller:
    return await caller_of_connection(connection, services)


AnyCaller = Annotated[Caller, Depends(_caller_by_either)]
"""Who asks; an API key or a token is needed."""


async def _team_of_either(caller: AnyCaller) -> TeamId:
    return caller.team_id


def has_credentials(connection: HTTPConnection) -> bool:
    """Whether the headers of a request carry a credential, good or bad."""
    return "x-api-key" in connection.headers or "authorization" in connection.headers


async def caller_of_secret(secret: str, services: Services) -> Caller:
    """Who is behind an API key or a token; raises `Unauthorized`."""
    if secret.startswith(KEY_PREFIXES):
        return await services.api_keys.caller_of_key(secret)
    return await services.accounts.caller_of_token(secret)


TokenTeam = Annotated[TeamId, Depends(_team_of_token)]
"""The caller's team; a token is needed."""

CallerTeam = Annotated[TeamId, Depends(_team_of_either)]
"""The caller's team; an API key or a token is needed."""
