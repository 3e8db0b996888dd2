"""`/v1/sandboxes/{id}/files/archive`: trees of a sandbox's files as tar archives."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Final
from urllib.parse import parse_qs

from fastapi import APIRouter, Query
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from wrenn_sandbox.control.service.guests import checked_path
from wrenn_sandbox.errors import InvalidRequest

from .authentication import CallerTeam
from .fields import ResponseModel
from .middleware import HEAD_ALONE
from .responses import HeldResponse, failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes/{id}/files", tags=["sandboxes"])

BODY_LIMITS: Final = ((re.compile(r"/v1/sandboxes/[^/]+/files/archive"), None),)
"""An archive may have any size."""

_MEDIA_TYPE: Final = "application/x-tar"
_BYTES: Final = {"schema": {"type": "string", "format": "binary"}}
_Path = Annotated[str, Query(description="Absolute, or relative to the user's home directory")]
_User = Annotated[str | None, Query(description="Whose rights are used; root")]


class LeftOut(ResponseModel):
    """A path that was not copied, and why."""

    path: str
    reason: str


class UnpackedArchive(ResponseModel):
    """Of `left_out_count` paths that were left out `left_out` names the first.

    `size` is of the files in it, in bytes. `into_directory`: it was put into `path`, not in its
    place.
    """

    entries: int
    size: int
    into_directory: bool
    left_out: list[LeftOut]
    left_out_count: int


@router.get(
    "/archive",
    operation_id="downloadArchive",
    response_class=Response,
    responses={
        200: {"description": "A tar archive", "content": {_MEDIA_TYPE: _BYTES}},
        **failures(400, 401, 404, 409, 429, 502),
    },
)
async def download_archive(
    id: str,
    request: Request,
    team_id: CallerTeam,
    services: ServicesDependency,
    path: _Path,
    recursive: bool = False,
    user: _User = None,
) -> Response:
    """A file or, with `recursive`, a tree with modes, times, symbolic and hard links.

    Without `recursive` a symbolic link is what it leads to, and a directory is refused. What cannot
    be read is left out; a global header (`WRENN.left_out`, `WRENN.reason`) names it.
    """
    tree = _raw_path(request)

    @asynccontextmanager
    async def archive() -> AsyncIterator[Response]:
        """One that breaks off ends the connection, never the body."""
        async with (
            services.guests.using(team_id, id) as guest,
            guest.pack(tree, recursive=recursive, user=user) as chunks,
        ):
            if request.scope.get(HEAD_ALONE):
                answer = Response(media_type=_MEDIA_TYPE)
                del answer.headers["Content-Length"]
                yield answer
            else:
                yield StreamingResponse(chunks, media_type=_MEDIA_TYPE)

    return HeldResponse(archive())


@router.put(
    "/archive",
    operation_id="uploadArchive",
    responses=failures(400, 401, 404, 409, 429, 502, 507),
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/octet-stream": _BYTES}}
    },
)
async def upload_archive(
    id: str,
    request: Request,
    team_id: CallerTeam,
    services: ServicesDependency,
    path: _Path,
    directory: bool = False,
    user: _User = None,
) -> UnpackedArchive:
    """Unpack a tar archive into a directory, or in the place of `path`.

    When `path` is a directory or ends with `/`, what the archive holds is put into it. Else the
    archive has one file or one tree, and that takes the place of `path`; with `directory` this is
    refused. What it makes is
    `user`'s. A file takes its place when it is complete; the answer names what was left out.
    """
    async with services.guests.using(team_id, id) as guest:
        found = await guest.unpack(
            _raw_path(request), _body(request), needs_directory=directory, user=user
        )
    return UnpackedArchive.of(found)


def _raw_path(request: Request) -> str:
    """The path of the query; bytes that are no UTF-8 are escaped, as everywhere in Python."""
    query = request.scope["query_string"].decode("latin-1")
    values = parse_qs(query, keep_blank_values=True, errors="surrogateescape")
    return checked_path(values["path"][-1])


async def _body(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect as error:
        raise InvalidRequest("The archive is incomplete") from error
