# Made by tools/make_sync_client.py from _async/client.py: change that file.
"""The client: one server, one caller."""

from datetime import date
from typing import Self

import httpx2

from wrenn_sandbox.client.models import ApiKey, Session, Template, Usage, UsageHistory
from wrenn_sandbox.client.transport import ANSWER_TIMEOUT_SEC, given, path_of

from .api import Api
from .events import Events, Webhooks
from .sandboxes import Sandboxes
from .secrets import Secrets


class ApiKeys:
    """The team's keys; a token is needed (`Client.login`)."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def create(self, name: str | None = None) -> ApiKey:
        """Make a key. `key` of the answer is the only place where it is ever shown."""
        return self._api.call("POST", "/v1/api-keys", ApiKey, given(name=name))

    def list(self) -> tuple[ApiKey, ...]:
        """All of them, newest first."""
        return self._api.call("GET", "/v1/api-keys", tuple[ApiKey, ...])

    def delete(self, id: str) -> None:
        """Delete a key, which stops working at once."""
        self._api.request("DELETE", path_of("v1", "api-keys", id))


class Snapshots:
    """Templates: the host's, and those that the team made of sandboxes."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def create(
        self,
        sandbox_id: str,
        name: str | None = None,
        *,
        overwrite: bool = False,
        idempotency_key: str | None = None,
    ) -> Template:
        """Make a template of a running sandbox, which ends with it.

        The same call with the same `idempotency_key` gives the same answer for 24 hours.
        `AlreadyExists`: the name is taken, and `overwrite` is not set or the name is the host's.
        """
        body = given(sandbox_id=sandbox_id, name=name)
        params = given(overwrite="true" if overwrite else None)
        return self._api.call(
            "POST",
            "/v1/snapshots",
            Template,
            body,
            params=params,
            idempotency_key=idempotency_key,
        )

    def list(self, type: str | None = None) -> tuple[Template, ...]:
        """Newest first; only those of a `type`, `base` or `snapshot`, when it is given."""
        params = given(type=type)
        return self._api.call("GET", "/v1/snapshots", tuple[Template, ...], params=params)

    def delete(self, name: str) -> None:
        """Give up a template; sandboxes made from it keep working."""
        self._api.request("DELETE", path_of("v1", "snapshots", name))


class Client:
    """Talks to the server at `url` with an API key, a token, or both.

    `timeout` is how many seconds an answer may take. Every error is a `ClientError`. Use it as
    the context of a `with` block, or close it.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        token: str | None = None,
        timeout: float = ANSWER_TIMEOUT_SEC,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._api = Api(url, api_key=api_key, token=token, timeout=timeout, transport=transport)
        self.api_keys = ApiKeys(self._api)
        self.sandboxes = Sandboxes(self._api)
        self.snapshots = Snapshots(self._api)
        self.events = Events(self._api)
        self.webhooks = Webhooks(self._api)
        self.secrets = Secrets(self._api)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the connections."""
        self._api.close()

    def signup(self, email: str, password: str) -> Session:
        """Make a user with a team of their own; the client acts as that user from now on."""
        return self._enter("/v1/auth/signup", email, password)

    def login(self, email: str, password: str) -> Session:
        """Log in; the client acts as that user from now on."""
        return self._enter("/v1/auth/login", email, password)

    def usage(self) -> Usage:
        """What the team may have, and what it has."""
        return self._api.call("GET", "/v1/usage", Usage)

    def usage_history(self, first: date | None = None, last: date | None = None) -> UsageHistory:
        """How long sandboxes ran on each day (UTC), deleted ones too.

        By default the last 30 days until today; at most 366.
        """
        days = {"from": first, "to": last}
        params = {name: day.isoformat() for name, day in days.items() if day is not None}
        return self._api.call("GET", "/v1/usage/history", UsageHistory, params=params)

    def use_key(self, key: str) -> None:
        """Send this API key from now on."""
        self._api.credentials["X-API-Key"] = key

    def _enter(self, path: str, email: str, password: str) -> Session:
        body = {"email": email, "password": password}
        session = self._api.call("POST", path, Session, body)
        self._api.credentials["Authorization"] = f"Bearer {session.token}"
        return session
