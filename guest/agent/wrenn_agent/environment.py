"""Environment variables and working directories of commands."""

from __future__ import annotations

import os
import stat

from .spawn import DEFAULT_PATH
from .template import Template
from .users import User

DEFAULT_LANG = "C.UTF-8"
_LOCALE_FILES = ("/etc/default/locale", "/etc/locale.conf")
"""Where distributions keep the locale of logins, as lines like `LANG=de_DE.UTF-8`."""
_LOCALE_BYTES = 16 * 1024


class Environment:
    """Defaults of the template, and those set by /init."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self.variables: dict[str, str] = {}
        self.trust: dict[str, str] = {}
        """Tells programs of an authority that they are to trust."""
        self.workdir: str | None = None
        self._locale: dict[str, str] = {}
        self.read_locale()

    def of_process(self, user: User, given: dict[str, str], terminal: bool) -> dict[str, str]:
        """All of it: that of a login, the template's, that of trust, of /init, the caller's."""
        envs = {
            "LANG": DEFAULT_LANG,
            "PATH": DEFAULT_PATH,
            "HOME": user.home,
            "USER": user.name,
            "LOGNAME": user.name,
            "SHELL": user.shell or "/bin/sh",
        }
        if terminal:
            envs["TERM"] = "xterm-256color"
        own = self._locale | self._template.env | self.trust | self.variables
        return envs | own | given

    def read_locale(self) -> None:
        """Take over what the image says of the locale; once for each life, not for each command."""
        self._locale = {}
        for path in _LOCALE_FILES:
            self._locale |= read_locale(path)

    def directory(self, user: User, given: str) -> str:
        """Where to start: as given, else as /init or the template says, else home, else `/`."""
        if given:
            return user.resolve(given)
        if self.workdir:
            return user.resolve(self.workdir)
        if self._template.workdir and os.path.isdir(self._template.workdir):
            return self._template.workdir
        return user.home if os.path.isdir(user.home) else "/"


def read_locale(path: str) -> dict[str, str]:
    """`LANG` and the like from a file of assignments; empty where it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return {}
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return {}
        lines = os.read(fd, _LOCALE_BYTES).decode("utf-8", "replace").split("\n")
    except OSError:
        return {}
    finally:
        os.close(fd)
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.strip().removeprefix("export ").partition("=")
        value = value.strip("\"'")
        if _is_locale_name(name) and value.isprintable() and value:
            found[name] = value
    return found


def _is_locale_name(name: str) -> bool:
    return name in ("LANG", "LANGUAGE") or (name.startswith("LC_") and name[3:].isalpha())
