"""Accounts: `/v1/auth`."""

from typing import Annotated, Self

from pydantic import Field

from wrenn_sandbox.control.service.accounts import Session
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

    @classmethod
    def of(cls, session: Session) -> Self:
        account = session.account
        return cls(
            token=session.token,
            user_id=account.user_id,
            team_id=account.team_id,
            email=account.email,
        )
