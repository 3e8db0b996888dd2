"""Users of the guest, read from /etc/passwd and /etc/group, and acting as one of them.

The files are read directly: name service modules of an arbitrary root filesystem cannot be loaded
into the agent's own interpreter.
"""

from __future__ import annotations

import os

from .errors import InvalidArgument, PermissionDenied

ROOT = "root"
_PASSWD, _GROUP = "/etc/passwd", "/etc/group"
_DEFAULT = "/etc/wrenn-user"
"""Where a template says as whom to act for callers who name nobody."""
_HIGHEST_ID = (1 << 32) - 2
"""The next one means "leave it" to the kernel."""


class User:
    """An account; `groups` are the supplementary groups."""

    __slots__ = ("gid", "groups", "home", "name", "shell", "uid")

    def __init__(
        self, name: str, uid: int, gid: int, groups: list[int], home: str, shell: str
    ) -> None:
        self.name = name
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.home = home
        self.shell = shell

    def resolve(self, path: str) -> str:
        """Absolute form of a path that may be relative to the home directory or start with `~`."""
        if not path or "\0" in path:
            raise InvalidArgument("path must not be empty or contain NUL")
        if path == "~" or path.startswith("~/"):
            path = path[2:]
        return os.path.normpath(os.path.join(self.home, path)) if path else self.home


class Names:
    """Names of user and group ids; an id without one is shown in digits."""

    def __init__(self, users: dict[int, str], groups: dict[int, str]) -> None:
        self._users = users
        self._groups = groups

    def user(self, uid: int) -> str:
        """Name of a user id."""
        return self._users.get(uid, str(uid))

    def group(self, gid: int) -> str:
        """Name of a group id."""
        return self._groups.get(gid, str(gid))

    def group_id(self, name: str) -> int | None:
        """Group id of a name or of digits."""
        found = (gid for gid, known in self._groups.items() if known == name)
        return next(found, _number(name))


class Users:
    """The accounts of this guest; `root_home` overrides root's home directory."""

    def __init__(self, root_home: str | None = None) -> None:
        self._root_home = root_home
        self._stamp: tuple[int, int] | None = None
        self._users: dict[str, User] = {}
        self._names = Names({}, {})

    def find(self, name: str) -> User:
        """The account called `name`; InvalidArgument when there is none.

        As in images of containers it may be a number, of no account too, and a group may follow
        after a colon.
        """
        self._refresh()
        user = self._users.get(name)
        if user is not None:
            return user
        account, colon, group = name.partition(":")
        user = self._users.get(account) or self._numbered(account)
        if user is None:
            raise InvalidArgument(f"user {name!r} does not exist")
        if not colon:
            return user
        gid = self._names.group_id(group)
        if gid is None:
            raise InvalidArgument(f"group {group!r} does not exist")
        return User(user.name, user.uid, gid, [], user.home, user.shell)

    def _numbered(self, text: str) -> User | None:
        uid = _number(text)
        if uid is None:
            return None
        found = (user for user in self._users.values() if user.uid == uid)
        return next(found, User(text, uid, 0, [], "/", "/bin/sh"))

    def default(self) -> str:
        """The account of callers who name none: the template's, or else root."""
        try:
            with open(_DEFAULT) as file:
                name = file.readline(256).strip()
            self.find(name)
        except (OSError, ValueError, InvalidArgument):
            return ROOT
        return name

    def names(self) -> Names:
        """What user and group ids are called."""
        self._refresh()
        return self._names

    def _refresh(self) -> None:
        stamp = (_changed_at(_PASSWD), _changed_at(_GROUP))
        if stamp == self._stamp:
            return
        groups, members = _read_groups()
        self._users = {ROOT: User(ROOT, 0, 0, [], self._root_home or "/root", "/bin/sh")}
        for fields in _read_table(_PASSWD, 7):
            name, _, uid, gid, _, home, shell = fields[:7]
            if uid.isdigit() and gid.isdigit():
                if name == ROOT and self._root_home:
                    home = self._root_home
                extra = members.get(name, [])
                self._users[name] = User(name, int(uid), int(gid), extra, home or "/", shell)
        self._names = Names({user.uid: user.name for user in self._users.values()}, groups)
        self._stamp = stamp


class ActingAs:
    """Context in which system calls run with the rights of `user`; nothing may be awaited inside.

    The saved ids stay root's, so there is a way back; a program that is executed inside loses
    them. An agent without root's rights always acts as itself.
    """

    def __init__(self, user: User) -> None:
        self._user = user
        self._switched = user.uid != 0 and os.geteuid() == 0

    def __enter__(self) -> None:
        if not self._switched:
            return
        try:
            os.setgroups([*self._user.groups, self._user.gid])
            os.setresgid(self._user.gid, self._user.gid, 0)
            os.setresuid(self._user.uid, self._user.uid, 0)
        except OSError as error:
            self._back()
            raise PermissionDenied(f"cannot act as {self._user.name!r}") from error

    def __exit__(self, *_exc: object) -> None:
        if self._switched:
            self._back()

    def _back(self) -> None:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups([])


def _number(text: str) -> int | None:
    """A user or group id in digits; None where it is none."""
    if not (text.isascii() and text.isdigit()) or len(text) > 10 or int(text) > _HIGHEST_ID:
        return None
    return int(text)


def _changed_at(path: str) -> int:
    """When a file changed (ns since 1970), 0 without one."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _read_table(path: str, columns: int) -> list[list[str]]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            rows = [line.rstrip("\n").split(":") for line in file]
    except OSError:
        return []
    return [row for row in rows if len(row) >= columns]


def _read_groups() -> tuple[dict[int, str], dict[str, list[int]]]:
    names: dict[int, str] = {}
    members: dict[str, list[int]] = {}
    for name, _, gid, listed in (row[:4] for row in _read_table(_GROUP, 4)):
        if gid.isdigit():
            names.setdefault(int(gid), name)
            for member in listed.split(","):
                members.setdefault(member, []).append(int(gid))
    return names, members
