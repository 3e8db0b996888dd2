"""Files of a sandbox: `/v1/sandboxes/{id}/files`."""

import math
from datetime import datetime
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from wrenn_sandbox.control.service.guests import checked_path, decoded_path
from wrenn_sandbox.wire.messages import FileType

from .fields import Integer, NullableText, OptionalArgument, Request, Response


class _PathRequest(Request):
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


class FileEntry(Response):
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


class DirectoryListing(Response):
    entries: list[FileEntry]


class MakeDirectoryResponse(Response):
    entry: FileEntry
