"""Watching directories with inotify."""

from __future__ import annotations

import os
import select
import struct
from collections import deque

from .loop import Loop, Notice
from .syscalls import inotify_add_watch, inotify_init, inotify_rm_watch
from .upload import CREATING_PREFIX, REPLACING_PREFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .users import User

Event = tuple[str, str]
"""A path relative to the watched directory, and the type."""

MAX_PENDING = 8192
"""Events kept for a slow reader; what comes on top stays with the kernel, and is dropped there."""
_READ_SIZE = 64 * 1024
_HEADER = struct.Struct("iIII")

_MODIFY, _ATTRIB = 0x2, 0x4
_MOVED_FROM, _MOVED_TO = 0x40, 0x80
_CREATE, _DELETE = 0x100, 0x200
_IGNORED, _IS_DIRECTORY = 0x8000, 0x40000000
_ONLY_DIRECTORY, _EXCLUDE_UNLINKED = 0x01000000, 0x04000000
_WATCHED = (
    _MODIFY
    | _ATTRIB
    | _MOVED_FROM
    | _MOVED_TO
    | _CREATE
    | _DELETE
    | _ONLY_DIRECTORY
    | _EXCLUDE_UNLINKED
)
CREATED, WRITTEN, CHANGED = "EVENT_TYPE_CREATE", "EVENT_TYPE_WRITE", "EVENT_TYPE_CHMOD"
DESCRIBED = (CREATED, WRITTEN, CHANGED)
"""Types of events after which there is something to describe."""
_NAMES = {
    _CREATE: CREATED,
    _MOVED_TO: CREATED,
    _MODIFY: WRITTEN,
    _DELETE: "EVENT_TYPE_REMOVE",
    _MOVED_FROM: "EVENT_TYPE_RENAME",
    _ATTRIB: CHANGED,
}


class DirectoryWatch:
    """What happens in one directory, or (recursive) in the whole tree below it.

    `described_for` is the user with whose rights entries are described, if they are at all.
    """

    def __init__(self, loop: Loop, path: str, recursive: bool, described_for: User | None) -> None:
        """Start to watch; raises OSError, ENOSPC when the kernel's limit is reached."""
        self._loop = loop
        self._top = path
        self._recursive = recursive
        self.described_for = described_for
        self._folders: dict[int, str] = {}
        """Watch descriptor to path relative to the top, empty for the top."""
        self._events: deque[Event] = deque()
        self._upload = (0, False)
        """Cookie of the last rename of an upload's temporary file, and whether it replaces one."""
        self._reading = False
        self._closed = False
        self.changed = Notice(loop)
        self._fd = inotify_init()
        try:
            self._add("")
            if recursive:
                self._add_below("", announce=False)
        except OSError:
            os.close(self._fd)
            raise
        self._read_on()

    def take(self) -> list[Event]:
        """All pending events, which are forgotten."""
        events = list(self._events)
        self._events.clear()
        self._read_on()
        return events

    def full_path(self, path: str) -> str:
        """The absolute path of what an event names."""
        return os.path.normpath(os.path.join(self._top, path))

    def close(self) -> None:
        """Stop watching."""
        if not self._closed:
            self._closed = True
            self._loop.unregister(self._fd)
            os.close(self._fd)

    def _read_on(self) -> None:
        if not self._reading and not self._closed:
            self._reading = True
            self._loop.register(self._fd, select.EPOLLIN, self._on_readable)

    def _on_readable(self, _events: int) -> None:
        if len(self._events) >= MAX_PENDING:
            self._reading = False
            self._loop.unregister(self._fd)
            return
        data = os.read(self._fd, _READ_SIZE)
        offset = 0
        while offset < len(data):
            watch, mask, cookie, size = _HEADER.unpack_from(data, offset)
            offset += _HEADER.size
            name = os.fsdecode(data[offset : offset + size].rstrip(b"\0"))
            offset += size
            self._on_event(watch, mask, cookie, name)
        self.changed.notify()

    def _on_event(self, watch: int, mask: int, cookie: int, name: str) -> None:
        if mask & _IGNORED:
            self._folders.pop(watch, None)
            return
        folder = self._folders.get(watch)
        if folder is None or (not name and folder):
            return  # of a directory that is watched through its parent as well
        path = os.path.join(folder, name)
        if name.startswith(REPLACING_PREFIX):
            self._upload = (cookie, not name.startswith(CREATING_PREFIX))
            return
        if mask & _MOVED_TO and self._upload[0] == cookie:
            kinds = (WRITTEN,) if self._upload[1] else (CREATED, CHANGED, WRITTEN)
            self._events.extend((path, kind) for kind in kinds)
            return
        for bit, kind in _NAMES.items():
            if mask & bit:
                self._events.append((path or ".", kind))
        if self._recursive and mask & _IS_DIRECTORY and name:
            if mask & _MOVED_FROM:
                self._drop_below(path)
            elif mask & (_CREATE | _MOVED_TO):
                self._follow(path, announce=bool(mask & _CREATE))

    def _follow(self, path: str, announce: bool) -> None:
        try:
            self._add(path)
            self._add_below(path, announce)
        except OSError:
            return  # gone again, or over the kernel's limit: the rest goes on

    def _add(self, path: str) -> None:
        full = os.path.join(self._top, path) if path else self._top
        self._folders[inotify_add_watch(self._fd, full, _WATCHED)] = path

    def _add_below(self, path: str, announce: bool) -> None:
        """Watch all directories below `path`; `announce` what was made there before the watch."""
        pending = [path]
        while pending:
            folder = pending.pop()
            with os.scandir(os.path.join(self._top, folder)) as entries:
                for entry in entries:
                    below = os.path.join(folder, entry.name)
                    if announce:
                        self._events.append((below, CREATED))
                    if entry.is_dir(follow_symlinks=False):
                        self._add(below)
                        pending.append(below)

    def _drop_below(self, path: str) -> None:
        inside = path + "/"
        for watch, folder in list(self._folders.items()):
            if folder == path or folder.startswith(inside):
                inotify_rm_watch(self._fd, watch)
                del self._folders[watch]
