"""Environment variables and working directories of commands."""

from __future__ import annotations

import os

from .spawn import DEFAULT_PATH
from .users import User


class Environment:
    """Defaults set by /init."""

    def __init__(self) -> None:
        self.variables: dict[str, str] = {}
        self.workdir: str | None = None

    def of_process(self, user: User, given: dict[str, str], terminal: bool) -> dict[str, str]:
        """The whole environment: that of a login, then of /init, then what the caller gives."""
        envs = {
            "PATH": DEFAULT_PATH,
            "HOME": user.home,
            "USER": user.name,
            "LOGNAME": user.name,
            "SHELL": user.shell or "/bin/sh",
        }
        if terminal:
            envs["TERM"] = "xterm-256color"
        return envs | self.variables | given

    def directory(self, user: User, given: str) -> str:
        """Where to start: as given, else the default of /init, else home, else `/`."""
        if given:
            return user.resolve(given)
        if self.workdir:
            return user.resolve(self.workdir)
        return user.home if os.path.isdir(user.home) else "/"
