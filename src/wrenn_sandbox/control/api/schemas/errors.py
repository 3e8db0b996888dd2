"""The one shape of every error."""

from pydantic import BaseModel, ConfigDict


class ErrorDetail(BaseModel):
    """`code` is for programs, `message` says what to do; some codes add keys."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str


class Error(BaseModel):
    error: ErrorDetail
