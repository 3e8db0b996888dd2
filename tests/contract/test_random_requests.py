"""Random requests, good and bad, made from the served document: never a 500, always conforming.

On a host in memory, because what is tried here includes removing every path there is; on
PostgreSQL, because it takes fewer kinds of text than SQLite.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import (
    ignored_auth,
    negative_data_rejection,
    positive_data_acceptance,
)

from support.api_server import PASSWORD, make_settings
from support.host_double import HostDouble
from support.live import live_server
from support.postgres import PostgresServer
from support.routes import own_routes
from wrenn_sandbox.control.api.openapi import build_openapi
from wrenn_sandbox.control.app import create_app

pytestmark = pytest.mark.postgres

_EXAMPLES = 15
_SEQUENCES = 10
_STEPS = 12
_NOT_OF_THE_DOCUMENT = [ignored_auth, negative_data_rejection, positive_data_acceptance]
"""Whether a request is accepted is no question of the document's schemas alone.

Either credential opens a route, unknown fields are ignored, a body may be empty where all its
fields are optional, and bounds are settings: `test_requests` and others hold these.
"""


@dataclass
class Caller:
    """A team, and names of what it has: half of the requests use them."""

    client: httpx2.Client
    turn: int = 0
    sandbox: str | None = None

    @property
    def url(self) -> str:
        return str(self.client.base_url)

    @property
    def headers(self) -> dict[str, str]:
        return {name: self.client.headers[name] for name in ("Authorization", "X-API-Key")}

    def fill(
        self,
        case: schemathesis.Case,  # type: ignore[type-arg]
    ) -> None:
        """Put names of what is there into every second request."""
        self.turn += 1
        if self.turn % 2 and case.path_parameters:
            path = case.operation.path
            for parameter in case.path_parameters:
                case.path_parameters[parameter] = self._name(path, parameter)
        body = case.body
        if self.turn % 4 and isinstance(body, dict) and "sandbox_id" in body:
            body["sandbox_id"] = self._sandbox()

    def _name(self, path: str, parameter: str) -> str:
        if parameter == "provider":
            return "github"
        if parameter == "name":
            return "minimal"
        if parameter != "id":
            return "proc-00000000"
        if path.startswith("/v1/webhooks"):
            return self._webhook()
        return self._key() if path.startswith("/v1/api-keys") else self._sandbox()

    def _sandbox(self) -> str:
        """A running sandbox; what became of the last one, nobody knows."""
        if self.sandbox is not None:
            path = f"/v1/sandboxes/{self.sandbox}"
            if self.client.get(path).json()["status"] == "running":
                return self.sandbox
            self.client.delete(path)
        self.sandbox = str(self.client.post("/v1/sandboxes").json()["id"])
        return self.sandbox

    def _key(self) -> str:
        return str(self.client.post("/v1/api-keys", json={}).json()["id"])

    def _webhook(self) -> str:
        """One that nothing can be delivered to; deleted again where there are too many."""
        for each in self.client.get("/v1/webhooks").json()[10:]:
            self.client.delete(f"/v1/webhooks/{each['id']}")
        body = {"url": "https://webhook.invalid/"}
        return str(self.client.post("/v1/webhooks", json=body).json()["id"])


NewCaller = Callable[[], AbstractContextManager[Caller]]


@pytest.fixture(scope="module")
def new_caller(
    tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer, migrated: str
) -> NewCaller:
    """Makes callers, each of a server with a database of its own."""
    return lambda: _calling(
        tmp_path_factory.mktemp("schema"), postgres.url(postgres.make_database(migrated))
    )


@pytest.fixture(scope="module")
def caller(new_caller: NewCaller) -> Iterator[Caller]:
    with new_caller() as made:
        yield made


@contextmanager
def _calling(directory: Path, database: str) -> Iterator[Caller]:
    with (
        live_server(make_settings(directory, database), HostDouble()) as url,
        httpx2.Client(base_url=url) as client,
    ):
        body = {"email": "fuzz@example.com", "password": PASSWORD}
        token = client.post("/v1/auth/signup", json=body).json()["token"]
        client.headers["Authorization"] = f"Bearer {token}"
        client.headers["X-API-Key"] = client.post("/v1/api-keys", json={}).json()["key"]
        yield Caller(client)


_APP = create_app(make_settings(Path("unused"), None), HostDouble())
schema = schemathesis.openapi.from_dict(
    build_openapi(own_routes(_APP), "http://localhost")
).exclude(
    operation_id="streamEvents"  # which has no end
)


@schema.parametrize()
@settings(
    max_examples=_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_random_requests_get_answers_of_the_contract(
    case: schemathesis.Case,  # type: ignore[type-arg]
    caller: Caller,
) -> None:
    caller.fill(case)
    case.call_and_validate(
        base_url=caller.url, headers=caller.headers, excluded_checks=_NOT_OF_THE_DOCUMENT
    )


def test_random_sequences_get_answers_of_the_contract(new_caller: NewCaller) -> None:
    """What one answer names is used by the next requests.

    Each sequence has a server of its own: what is drawn depends on what was answered before, and
    has to be the same when it is drawn again.
    """

    class Machine(schema.as_state_machine()):  # type: ignore[misc]
        def setup(self) -> None:
            super().setup()
            self._stack = ExitStack()
            self._caller = self._stack.enter_context(new_caller())

        def teardown(self) -> None:
            self._stack.close()
            super().teardown()

        def get_call_kwargs(self, case: object) -> dict[str, object]:
            return {"base_url": self._caller.url, "headers": self._caller.headers}

        def validate_response(
            self,
            response: schemathesis.Response,
            case: schemathesis.Case,  # type: ignore[type-arg]
            **_: object,
        ) -> None:
            case.validate_response(response, excluded_checks=_NOT_OF_THE_DOCUMENT)

    Machine.run(
        settings=settings(
            max_examples=_SEQUENCES,
            stateful_step_count=_STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
    )
