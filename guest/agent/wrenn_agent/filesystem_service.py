"""The RPC service `filesystem.Filesystem`."""

from __future__ import annotations

import errno
import os
import stat
from binascii import hexlify
from contextlib import suppress

from . import fields
from .auth import Auth
from .connect import StreamCall, dump
from .directories import make_directories, remove_tree
from .entries import DIRECTORY, describe
from .entries import shown as as_text
from .errors import (
    AgentError,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    from_os_error,
)
from .exchange import Exchange
from .fields import Message
from .files import as_asked, parse_mode
from .loop import Loop
from .users import ROOT, ActingAs, Names, User, Users
from .watch import DESCRIBED, DirectoryWatch, Event

MAX_ENTRIES = 20_000
MAX_WATCHERS = 256
_ENTRIES_PER_BREATH = 200


class FilesystemService:
    """Methods of `filesystem.Filesystem`; everything is done with the rights of the acting user."""

    def __init__(self, loop: Loop, auth: Auth, users: Users) -> None:
        self._loop = loop
        self._auth = auth
        self._users = users
        self._watchers: dict[str, DirectoryWatch] = {}

    async def stat(self, exchange: Exchange, message: Message) -> Message:
        """Describe one file."""
        user, path = self._path(exchange, message, "path")
        return {"entry": self._describe(user, path)}

    async def make_dir(self, exchange: Exchange, message: Message) -> Message:
        """Make a directory and its parents, as root, for `owner` or the acting user.

        `mode` is octal and that of the directory itself.
        """
        user, path = self._path(exchange, message, "path")
        owner, mode = fields.text(message, "owner"), parse_mode(message)
        _make_dir(path, self._auth.user(owner) if owner else user, mode)
        answer: Message = {"entry": self._describe(self._users.find(ROOT), path)}
        return answer | as_asked(owner, mode)

    async def move(self, exchange: Exchange, message: Message) -> Message:
        """Rename a file or directory; across file systems it is copied."""
        user, source = self._path(exchange, message, "source")
        _, destination = self._path(exchange, message, "destination")
        with ActingAs(user):
            try:
                os.makedirs(os.path.dirname(destination), 0o755, exist_ok=True)
                _rename(source, destination)
            except OSError as error:
                raise _told(error, source) from error
        return {"entry": self._describe(user, destination)}

    async def list_dir(self, exchange: Exchange, message: Message) -> bytes:
        """Describe what is in a directory, down to `depth` (default 1) levels.

        What is in a directory comes right after it, by names.
        """
        user, top = self._path(exchange, message, "path")
        depth = fields.number(message, "depth") or 1
        if depth < 0:
            raise InvalidArgument("depth must not be negative")
        names = self._users.names()
        entries: list[bytes] = []  # as JSON, which needs far less memory
        pending = [iter(self._list(user, top, required=True))]  # of each level what is left of it
        while pending:
            path = next(pending[-1], None)
            if path is None:
                pending.pop()
                continue
            if len(entries) >= MAX_ENTRIES:
                raise ResourceExhausted(f"more than {MAX_ENTRIES} entries")
            if len(entries) % _ENTRIES_PER_BREATH == _ENTRIES_PER_BREATH - 1:
                await self._loop.breathe()
            if _add_entry(entries, user, names, path) and len(pending) < depth:
                pending.append(iter(self._list(user, path, required=False)))
        return b'{"entries":[' + b",".join(entries) + b"]}"

    async def remove(self, exchange: Exchange, message: Message) -> Message:
        """Remove a file, or a directory with everything in it.

        One that is not there is an error only where it `mustExist`.
        """
        user, path = self._path(exchange, message, "path")
        if path == "/":
            raise InvalidArgument("the root directory cannot be removed")
        try:
            await remove_tree(self._loop, user, path)
        except FileNotFoundError as error:
            if fields.flag(message, "mustExist"):
                raise _told(error, path) from error
        except OSError as error:
            raise _told(error, path) from error
        return {}

    async def watch_dir(self, call: StreamCall) -> None:
        """Stream what happens in a directory."""
        message = await call.receive_request()
        watch = self._open_watch(call.exchange, message)
        try:
            call.put(b'{"start":{}}')
            await call.flush()
            call.keep_alive(watch.changed)
            while True:
                events = watch.take()
                for event in await self._shown(watch, events):
                    call.put(dump({"filesystem": event}))
                if not events and call.keepalive_due:
                    call.put(b'{"keepalive":{}}')
                await call.flush()
                if not events:
                    await watch.changed.wait()
        finally:
            watch.close()

    async def create_watcher(self, exchange: Exchange, message: Message) -> Message:
        """Collect what happens in a directory, to be fetched by `get_watcher_events`."""
        if len(self._watchers) >= MAX_WATCHERS:
            raise ResourceExhausted(f"more than {MAX_WATCHERS} watchers")
        watch = self._open_watch(exchange, message)
        watcher_id = "w" + hexlify(os.urandom(8)).decode()
        self._watchers[watcher_id] = watch
        return {"watcherId": watcher_id}

    async def get_watcher_events(self, _exchange: Exchange, message: Message) -> Message:
        """What has happened since the last call."""
        watch = self._watchers[self._watcher_id(message)]
        events: list[object] = [*await self._shown(watch, watch.take())]
        return {"events": events}

    async def remove_watcher(self, _exchange: Exchange, message: Message) -> Message:
        """Stop a watcher."""
        self._watchers.pop(self._watcher_id(message)).close()
        return {}

    def _watcher_id(self, message: Message) -> str:
        watcher_id = fields.text(message, "watcherId")
        if watcher_id not in self._watchers:
            raise NotFound(f"watcher {watcher_id!r} does not exist")
        return watcher_id

    def _path(self, exchange: Exchange, message: Message, field: str) -> tuple[User, str]:
        user = self._auth.user_of(exchange)
        return user, user.resolve(fields.path(message, field))

    async def _shown(self, watch: DirectoryWatch, events: list[Event]) -> list[Message]:
        """Events as they are told, where it was asked for with the entry as it is now."""
        names = self._users.names()
        shown: list[Message] = []
        for number, (path, kind) in enumerate(events, 1):
            event: Message = {"name": as_text(path), "type": kind}
            if watch.described_for is not None and kind in DESCRIBED:
                if number % _ENTRIES_PER_BREATH == 0:
                    await self._loop.breathe()
                with ActingAs(watch.described_for), suppress(OSError):  # gone in the meantime
                    event["entry"] = describe(watch.full_path(path), names)
            shown.append(event)
        return shown

    def _describe(self, user: User, path: str) -> Message:
        with ActingAs(user):
            try:
                return describe(path, self._users.names())
            except OSError as error:
                raise _told(error, path) from error

    def _list(self, user: User, directory: str, required: bool) -> list[str]:
        with ActingAs(user):
            try:
                if required and not stat.S_ISDIR(os.stat(directory).st_mode):
                    raise InvalidArgument(f"{directory} is not a directory")
                return sorted(os.path.join(directory, name) for name in os.listdir(directory))
            except OSError as error:
                if required:
                    raise _told(error, directory) from error
                return []  # removed in the meantime, or not readable for this user

    def _open_watch(self, exchange: Exchange, message: Message) -> DirectoryWatch:
        user, path = self._path(exchange, message, "path")
        recursive = fields.flag(message, "recursive")
        described_for = user if fields.flag(message, "includeEntry") else None
        with ActingAs(user):
            try:
                if not stat.S_ISDIR(os.stat(path).st_mode):
                    raise InvalidArgument(f"{path} is not a directory")
                return DirectoryWatch(self._loop, path, recursive, described_for)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise ResourceExhausted("too many directories are watched") from error
                raise _told(error, path) from error


def _add_entry(entries: list[bytes], user: User, names: Names, path: str) -> bool:
    """Append the entry at `path` unless it is gone; whether it is a real directory."""
    with ActingAs(user):
        try:
            entry = describe(path, names)
        except OSError:
            return False  # removed in the meantime
    entries.append(dump(entry))
    return "symlinkTarget" not in entry and entry["type"] == DIRECTORY


def _make_dir(path: str, owner: User, mode: int | None) -> None:
    if os.path.lexists(path):
        raise AlreadyExists(f"{path} exists already")
    try:
        make_directories(path, owner, mode)
    except OSError as error:
        raise _told(error, path) from error


def _rename(source: str, destination: str) -> None:
    try:
        os.rename(source, destination)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        import shutil  # large, and hardly ever needed

        shutil.move(source, destination)


def _told(error: OSError, path: str) -> AgentError:
    if error.errno == errno.EEXIST and os.path.lexists(path):
        return AlreadyExists(f"{path} exists already")
    if error.errno in (errno.ENOTEMPTY, errno.EISDIR):
        return FailedPrecondition(f"{path}: {os.strerror(error.errno).lower()}")
    return from_os_error(error, path)
