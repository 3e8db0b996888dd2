"""`/v1/auth`: sign-up and login."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request

from wrenn_sandbox.model.limits import PASSWORD_MIN

from .body import JsonBody
from .fields import RequestModel, ResponseModel
from .forwarded import group_of
from .middleware import client_address
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/auth", tags=["auth"])


class SignupRequest(RequestModel):
    email: Annotated[str, Field(json_schema_extra={"format": "email"})]
    password: Annotated[str, Field(min_length=PASSWORD_MIN)]


class LoginRequest(RequestModel):
    email: Annotated[str, Field(json_schema_extra={"format": "email"})]
    password: str


class AuthResponse(ResponseModel):
    token: str
    user_id: str
    team_id: str
    email: str


def attempted_from(request: Request) -> str:
    """Whose attempts a request counts among."""
    return group_of(client_address(request.scope))


@router.post(
    "/signup",
    operation_id="signup",
    status_code=201,
    responses=failures(400, 403, 409, 413, 429),
)
async def signup(
    request: Request,
    services: ServicesDependency,
    body: JsonBody[SignupRequest],
) -> AuthResponse:
    """Make a user with a team of their own and log them in.

    403 where the server's operator makes all accounts.
    """
    session = await services.accounts.signup(
        body.email, body.password, address=attempted_from(request)
    )
    return AuthResponse.of(session)


@router.post(
    "/login",
    operation_id="login",
    responses=failures(400, 401, 413, 429),
)
async def login(
    request: Request,
    services: ServicesDependency,
    body: JsonBody[LoginRequest],
) -> AuthResponse:
    """Exchange email and password for a token that is valid for six hours."""
    session = await services.accounts.login(
        body.email, body.password, address=attempted_from(request)
    )
    return AuthResponse.of(session)
