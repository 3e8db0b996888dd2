"""Describing files to callers (`EntryInfo` of the contract)."""

from __future__ import annotations

import binascii
import os
import stat

from .fields import Message
from .timestamps import format_time
from .users import Names

FILE, DIRECTORY = "FILE_TYPE_FILE", "FILE_TYPE_DIRECTORY"
XATTR_PREFIX = "user.e2b."


def describe(path: str, names: Names) -> Message:
    """The entry at an absolute `path`; of a symlink, type and mode are its target's.

    `symlinkTarget` is where a link leads in the end, or what it says when that is nowhere;
    `linkTarget` is what it says. Names that are not valid UTF-8 are shown with replacement
    characters and, in `rawPath`, as base64 of their bytes. Raises OSError.
    """
    info = os.lstat(path)
    entry: Message = {
        "name": shown(os.path.basename(path) or "/"),
        "type": DIRECTORY if stat.S_ISDIR(info.st_mode) else FILE,
        "path": shown(path),
        "size": str(info.st_size),
        "mode": stat.S_IMODE(info.st_mode),
        "permissions": stat.filemode(info.st_mode),
        "owner": names.user(info.st_uid),
        "group": names.group(info.st_gid),
        "modifiedTime": format_time(info.st_mtime_ns),
    }
    if not _is_text(path):
        entry["rawPath"] = binascii.b2a_base64(os.fsencode(path), newline=False).decode()
    if stat.S_ISLNK(info.st_mode):
        _describe_link(path, entry)
    elif stat.S_ISREG(info.st_mode):
        metadata = read_metadata(path)
        if metadata:
            entry["metadata"] = metadata
    return entry


def _describe_link(path: str, entry: Message) -> None:
    says = shown(os.readlink(path))
    entry["linkTarget"] = entry["symlinkTarget"] = says
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # broken, or on a way that this user may not go
    entry["symlinkTarget"] = shown(os.path.realpath(path))
    entry["mode"] = stat.S_IMODE(mode)
    if stat.S_ISDIR(mode):
        entry["type"] = DIRECTORY


def read_metadata(path: str) -> Message:
    """What uploads left in extended attributes; empty where the file system has none."""
    try:
        attributes = [name for name in os.listxattr(path) if name.startswith(XATTR_PREFIX)]
        return {
            shown(name[len(XATTR_PREFIX) :]): os.getxattr(path, name).decode("utf-8", "replace")
            for name in attributes
        }
    except OSError:
        return {}


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(path: str) -> str:
    """A path as valid Unicode: bytes that are no UTF-8 become replacement characters."""
    return path if _is_text(path) else os.fsencode(path).decode("utf-8", "replace")
