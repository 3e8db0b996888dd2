"""What the template says of its commands, where it was made of an OCI image."""

from __future__ import annotations

import json

_FILE = "/run/.wrenn/template.json"


class Template:
    """User, working directory and environment of commands; None and empty where nothing is said."""

    __slots__ = ("env", "user", "workdir")

    def __init__(
        self, user: str | None = None, workdir: str | None = None, env: dict[str, str] | None = None
    ) -> None:
        self.user = user
        self.workdir = workdir
        self.env = env or {}


def read_template(path: str = _FILE) -> Template:
    """The host wrote the file into the read-only runtime image; most templates have none."""
    try:
        with open(path, "rb") as file:
            found = json.load(file)
    except FileNotFoundError:
        return Template()
    return Template(found.get("user"), found.get("workdir"), found.get("env"))
