"""`/v1/sandboxes/{id}/files`: what is in a sandbox's file system."""

import asyncio
import math
import re
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import IO, Annotated, Final

from fastapi import APIRouter, Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from wrenn_sandbox.control.service.guests import (
    GuestService,
    checked_path,
    checked_user,
    decoded_path,
    mode_of,
)
from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.ids import TeamId
from wrenn_sandbox.wire import messages
from wrenn_sandbox.wire.guest import Guest
from wrenn_sandbox.wire.messages import FileType

from .authentication import CallerTeam
from .body import JsonBody
from .fields import Integer, NullableText, OptionalArgument, RequestModel, ResponseModel
from .multipart import FormStream
from .responses import HeldResponse, failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes/{id}/files", tags=["sandboxes"])

BUFFERED_LIMIT: Final = 100 * 1024 * 1024
"""Bytes of the whole body of a buffered upload."""

BODY_LIMITS: Final = (
    (re.compile(r"/v1/sandboxes/[^/]+/files/write"), BUFFERED_LIMIT),
    (re.compile(r"/v1/sandboxes/[^/]+/files/stream/write"), None),
)
"""Which paths take more than an ordinary body, and how much; None is without a limit."""

_COPY_BYTES: Final = 1024 * 1024
_FIELDS: Final = ("path", "raw_path", "user", "mode")
"""What may be said of a file that is written, as a part of the form or in the query."""

_FORM: Final[dict[str, object]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["path", "file"],
                    "properties": {
                        **{name: {"type": "string"} for name in _FIELDS},
                        "file": {"type": "string", "format": "binary"},
                    },
                }
            }
        },
    }
}
_CONTENT: Final[dict[int | str, dict[str, object]]] = {
    200: {
        "description": "The content",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    **failures(400, 401, 404, 409, 413, 429, 502),
}


class _PathRequest(RequestModel):
    """`raw_path`, base64 of a path's bytes, counts instead of `path`, which may be missing then."""

    model_config = ConfigDict(json_schema_extra={"required": ["path"]})

    path: Annotated[str, Field(default_factory=str)]
    raw_path: OptionalArgument = None

    @property
    def target(self) -> str:
        """The path that is meant, bytes that are no UTF-8 escaped; raises `InvalidRequest`."""
        return checked_path(self.path if self.raw_path is None else decoded_path(self.raw_path))


class ReadFileRequest(_PathRequest):
    pass


class ListFilesRequest(_PathRequest):
    """`depth` levels of directories are shown, each right before what is in it."""

    depth: Annotated[Integer, Field(ge=1, le=64)] = 1


class MakeDirectoryRequest(_PathRequest):
    """What is made belongs to `user` (root). `mode`, octal digits, is the directory's own."""

    user: OptionalArgument = None
    mode: OptionalArgument = None


class RemoveFileRequest(_PathRequest):
    pass


def _seconds(time: datetime) -> int:
    return math.floor(time.timestamp())


class FileEntry(ResponseModel):
    """A symlink is described itself. `raw_path` is base64 of a path that is no UTF-8.

    `modified_at` is in seconds since 1970.
    """

    name: str
    path: str
    type: Annotated[
        FileType, WithJsonSchema({"type": "string", "enum": [each.value for each in FileType]})
    ]
    size: int
    mode: int
    permissions: str
    owner: str
    group: str
    modified_at: Annotated[int, BeforeValidator(_seconds)]
    symlink_target: NullableText = None
    raw_path: NullableText = None


class DirectoryListing(ResponseModel):
    entries: list[FileEntry]


class MakeDirectoryResponse(ResponseModel):
    entry: FileEntry


class _Query(BaseModel):
    """What the query may say of a file that is written."""

    path: str | None = None
    raw_path: str | None = None
    user: str | None = None
    mode: str | None = None


@router.post(
    "/write",
    operation_id="uploadFile",
    status_code=204,
    responses=failures(400, 401, 404, 409, 413, 429, 502, 507),
    openapi_extra=_FORM,
)
async def upload_file(
    id: str,
    request: Request,
    team_id: CallerTeam,
    services: ServicesDependency,
    query: Annotated[_Query, Query()],
) -> None:
    """Write a file of up to 100 MiB; the parts of the form may come in any order.

    `path` or `raw_path` (base64 of its bytes), `user` and `mode` may be query parameters too. A new
    file belongs to `user` (root) and has `mode` (0644), octal digits; one that is replaced keeps
    its owner, extended attributes and hard links, and without `mode` its permissions. Where the
    path comes before `file`, so do `user` and `mode`.
    """
    await _receive(request, services.guests, team_id, id, query, may_spool=True)


@router.post(
    "/stream/write",
    operation_id="streamUploadFile",
    status_code=204,
    responses=failures(400, 401, 404, 409, 429, 502, 507),
    openapi_extra=_FORM,
)
async def stream_upload_file(
    id: str,
    request: Request,
    team_id: CallerTeam,
    services: ServicesDependency,
    query: Annotated[_Query, Query()],
) -> None:
    """Write a file of any size: all else comes before `file`, or as query parameters.

    The fields are those of `/files/write`.
    """
    await _receive(request, services.guests, team_id, id, query, may_spool=False)


@router.post(
    "/stream/read",
    operation_id="streamDownloadFile",
    name="stream_download_file",
    description="The content of a file of any size.",
    response_class=Response,
    responses=_CONTENT,
)
@router.post(
    "/read",
    operation_id="downloadFile",
    response_class=Response,
    responses=_CONTENT,
)
async def download_file(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[ReadFileRequest],
) -> Response:
    """The content of a file."""
    return HeldResponse(_download(services.guests, team_id, id, body.target))


@router.post(
    "/list",
    operation_id="listFiles",
    response_model=DirectoryListing,
    responses=failures(400, 401, 404, 409, 413, 429, 502),
)
async def list_files(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[ListFilesRequest],
) -> Response:
    """What is in a directory, `depth` levels down."""
    async with services.guests.using(team_id, id) as guest:
        entries = await guest.list_directory(body.target, body.depth)
    listing = await asyncio.to_thread(_listing, entries)
    return Response(listing, media_type="application/json")


@router.post(
    "/mkdir",
    operation_id="makeDirectory",
    response_model_exclude_none=True,
    responses=failures(400, 401, 404, 409, 413, 429, 502),
)
async def make_directory(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[MakeDirectoryRequest],
) -> MakeDirectoryResponse:
    """Make a directory and its parents."""
    async with services.guests.using(team_id, id) as guest:
        user = None if body.user is None else checked_user(body.user)
        mode = None if body.mode is None else mode_of(body.mode)
        made = await guest.make_directory(body.target, user=user, mode=mode)
        return MakeDirectoryResponse.of({"entry": made})


@router.post(
    "/remove",
    operation_id="removeFile",
    status_code=204,
    responses=failures(400, 401, 404, 409, 413, 429, 502),
)
async def remove_file(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[RemoveFileRequest],
) -> None:
    """Remove a file, or a directory with all that is in it."""
    async with services.guests.using(team_id, id) as guest:
        await guest.remove_path(body.target)


@asynccontextmanager
async def _download(
    guests: GuestService, team_id: TeamId, sandbox_id: str, path: str
) -> AsyncIterator[Response]:
    """A file on its way. One that breaks off ends the connection, never the body."""
    async with guests.using(team_id, sandbox_id) as guest, guest.read_file(path) as content:
        size = {} if content.size is None else {"Content-Length": str(content.size)}
        yield StreamingResponse(content.chunks, headers=size, media_type="application/octet-stream")


def _listing(entries: list[messages.FileEntry]) -> str:
    """As JSON: of 20,000 entries that is a fifth of a second's work."""
    return DirectoryListing.of({"entries": entries}).model_dump_json(exclude_none=True)


class _Fields:
    """What a form and its query say of the file beside its content."""

    def __init__(self, query: _Query) -> None:
        self._given: dict[str, str] = {}
        self._path: str | None = None
        self._raw_path: str | None = None
        self.user: str | None = None
        self.mode: int | None = None
        for name, text in query.model_dump(exclude_none=True).items():
            self.take(name, text)

    def take(self, name: str, text: str) -> None:
        """Raises `InvalidRequest` for what is not acceptable or was given differently before."""
        if self._given.setdefault(name, text) != text:
            raise InvalidRequest(f"{name}: it was given twice, and differently")
        match name:
            case "path":
                self._path = checked_path(text)
            case "raw_path":
                self._raw_path = checked_path(decoded_path(text))
            case "user":
                self.user = checked_user(text)
            case "mode":
                self.mode = mode_of(text)

    @property
    def path(self) -> str | None:
        return self._path if self._raw_path is None else self._raw_path

    def refuse(self, name: str) -> None:
        """Raise `InvalidRequest` for a part that comes after the file and would mean something."""
        if name == "file" or name in self._given:
            raise InvalidRequest(f"{name}: the form has more than one such part")
        if name in _FIELDS:
            raise InvalidRequest(f"{name}: must come before file, or as a query parameter")


async def _receive(
    request: Request,
    guests: GuestService,
    team_id: TeamId,
    sandbox_id: str,
    query: _Query,
    *,
    may_spool: bool,
) -> None:
    """Write the file of a form. One that comes before its path is kept where it `may_spool`."""
    async with guests.using(team_id, sandbox_id) as guest:
        form = FormStream(request)
        fields = _Fields(query)
        while (name := await form.next_part()) is not None:
            if name in _FIELDS:
                fields.take(name, await form.text())
            elif name == "file" and fields.path is not None:
                await _write(guest, fields, _last_part(form, fields))
                return
            elif name == "file":
                if not may_spool:
                    raise InvalidRequest("path: must come before file, or as a query parameter")
                with guests.spooling(team_id, sandbox_id):
                    async with _spooled(form, fields) as chunks:
                        await _write(guest, fields, chunks)
                return
        raise InvalidRequest("file: the form has no such part")


async def _write(guest: Guest, fields: _Fields, chunks: AsyncIterator[bytes]) -> None:
    assert fields.path is not None
    await guest.write_file(fields.path, chunks, user=fields.user, mode=fields.mode)


async def _last_part(form: FormStream, fields: _Fields) -> AsyncIterator[bytes]:
    """The pieces of the current part; it ends only when the rest of the form is acceptable."""
    async for piece in form.pieces():
        yield piece
    while (name := await form.next_part()) is not None:
        fields.refuse(name)


@asynccontextmanager
async def _spooled(form: FormStream, fields: _Fields) -> AsyncIterator[AsyncIterator[bytes]]:
    """The pieces of a form whose file comes before its path: it waits in a nameless file."""
    spool = await asyncio.to_thread(tempfile.TemporaryFile)
    try:
        await _spool(form, spool.write)
        while (name := await form.next_part()) is not None:
            if name == "file":
                raise InvalidRequest("file: the form has more than one such part")
            if name in _FIELDS:
                fields.take(name, await form.text())
        if fields.path is None:
            raise InvalidRequest("path: the form has no such part")
        await asyncio.to_thread(spool.seek, 0)
        yield _pieces_of(spool)
    finally:
        await asyncio.to_thread(spool.close)


async def _spool(form: FormStream, write: Callable[[bytes], int]) -> None:
    waiting = bytearray()
    async for piece in form.pieces():
        waiting += piece
        if len(waiting) >= _COPY_BYTES:
            await asyncio.to_thread(write, bytes(waiting))
            waiting.clear()
    await asyncio.to_thread(write, bytes(waiting))


async def _pieces_of(file: IO[bytes]) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(file.read, _COPY_BYTES):
        yield piece
