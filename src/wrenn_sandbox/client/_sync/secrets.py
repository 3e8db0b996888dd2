# Made by tools/make_sync_client.py from _async/secrets.py: change that file.
"""Secrets, which hosts put into requests of sandboxes."""

from wrenn_sandbox.client.models import Secret
from wrenn_sandbox.client.transport import path_of

from .api import Api


class Secrets:
    """Values that network policies refer to by name. `NotFound`: there is no secret of that name.

    No answer has a value.
    """

    def __init__(self, api: Api) -> None:
        self._api = api

    def create(self, name: str, value: str) -> Secret:
        """Keep a value: printable ASCII on one line. `Conflict`: there is a secret of that name."""
        body = {"name": name, "value": value}
        return self._api.call("POST", "/v1/secrets", Secret, body)

    def list(self) -> tuple[Secret, ...]:
        """All of them, newest first."""
        return self._api.call("GET", "/v1/secrets", tuple[Secret, ...])

    def get(self, name: str) -> Secret:
        """When it was made and changed."""
        return self._api.call("GET", _path(name), Secret)

    def replace(self, name: str, value: str) -> Secret:
        """Give it another value; the next requests of running sandboxes have it."""
        return self._api.call("PUT", _path(name), Secret, {"value": value})

    def delete(self, name: str) -> None:
        """Forget it. `Conflict`: the network policy of a sandbox refers to it."""
        self._api.request("DELETE", _path(name))


def _path(name: str) -> str:
    return path_of("v1", "secrets", name)
