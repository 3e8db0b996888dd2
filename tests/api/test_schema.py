"""Random requests, good and bad, made from the served document: never a 500, always conforming."""

from collections.abc import Iterator
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

from api.double import HostDouble
from api.harness import PASSWORD, make_settings
from api.live import live_server
from wrenn_sandbox.control.api.openapi import build_openapi
from wrenn_sandbox.control.app import create_app

_EXAMPLES = 40


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory: Path = tmp_path_factory.mktemp("schema")
    login = {
        "public_url": "http://localhost",
        "oauth_redirect_url": "http://localhost",
        "oauth_github_client_id": "id",
        "oauth_github_client_secret": "secret",
        "oauth_github_url": "http://127.0.0.1:1",
    }
    with live_server(make_settings(directory, None, **login), HostDouble()) as url:
        yield url


@pytest.fixture(scope="module")
def credentials(url: str) -> dict[str, str]:
    with httpx2.Client(base_url=url) as client:
        body = {"email": "fuzz@example.com", "password": PASSWORD}
        token = client.post("/v1/auth/signup", json=body).json()["token"]
        bearer = {"Authorization": f"Bearer {token}"}
        key = client.post("/v1/api-keys", json={}, headers=bearer).json()["key"]
    return {**bearer, "X-API-Key": key}


_APP = create_app(make_settings(Path("unused"), None), HostDouble())
schema = schemathesis.openapi.from_dict(build_openapi(_APP, "http://localhost"))


@schema.parametrize()
@settings(
    max_examples=_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_random_requests(
    case: schemathesis.Case,  # type: ignore[type-arg]
    url: str,
    credentials: dict[str, str],
) -> None:
    """Whether a request is accepted is no question of the document's schemas alone.

    Either credential opens a route, unknown fields are ignored, a body may be empty where all
    its fields are optional, and bounds are settings: `test_requests` and others hold these.
    """
    case.call_and_validate(
        base_url=url,
        headers=credentials,
        excluded_checks=[ignored_auth, negative_data_rejection, positive_data_acceptance],
    )
