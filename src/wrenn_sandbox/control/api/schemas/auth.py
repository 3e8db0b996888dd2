"""Accounts: `/v1/auth`."""

from typing import Annotated

from pydantic import Field

from wrenn_sandbox.model.limits import PASSWORD_MIN

from .fields import Request, Response


class SignupRequest(Request):
    email: Annotated[str, Field(json_schema_extra={"format": "email"})]
    password: Annotated[str, Field(min_length=PASSWORD_MIN)]


class LoginRequest(Request):
    email: Annotated[str, Field(json_schema_extra={"format": "email"})]
    password: str


class AuthResponse(Response):
    token: str
    user_id: str
    team_id: str
    email: str
