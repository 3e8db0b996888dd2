"""Files of a sandbox: `/v1/sandboxes/{id}/files`."""

from datetime import datetime
from typing import Annotated, Self

from pydantic import Field, WithJsonSchema

from wrenn_sandbox.wire import messages
from wrenn_sandbox.wire.messages import FileType

from .fields import Integer, NullableText, Request, Response


class ReadFileRequest(Request):
    path: str


class ListFilesRequest(Request):
    """`depth` levels of directories are shown."""

    path: str
    depth: Annotated[Integer, Field(ge=1, le=64)] = 1


class MakeDirectoryRequest(Request):
    path: str


class RemoveFileRequest(Request):
    path: str


class FileEntry(Response):
    """A symlink is described itself. `raw_path` is base64 of a path that is no UTF-8."""

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
    modified_at: datetime
    symlink_target: NullableText = None
    raw_path: NullableText = None

    @classmethod
    def of(cls, entry: messages.FileEntry) -> Self:
        return cls(
            name=entry.name,
            path=entry.path,
            type=entry.type,
            size=entry.size,
            mode=entry.mode,
            permissions=entry.permissions,
            owner=entry.owner,
            group=entry.group,
            modified_at=entry.modified_at,
            symlink_target=entry.symlink_target,
            raw_path=entry.raw_path,
        )


class DirectoryListing(Response):
    entries: list[FileEntry]

    @classmethod
    def of(cls, entries: list[messages.FileEntry]) -> Self:
        return cls(entries=[FileEntry.of(entry) for entry in entries])


class MakeDirectoryResponse(Response):
    entry: FileEntry

    @classmethod
    def of(cls, entry: messages.FileEntry) -> Self:
        return cls(entry=FileEntry.of(entry))
