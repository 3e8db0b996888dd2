"""The server's messages in the words of the command line."""

import pytest

from wrenn_sandbox.cli.advice import told
from wrenn_sandbox.client import ClientError, ConnectionFailed, InvalidRequest, NotFound


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("memory_mb must be between 128 and 8192", "--memory must be between 128 and 8192"),
        ("network.allow.0: must be a range", "--allow: must be a range"),
        ("envs.A: names", "--env: names"),
        ("username: is long", "username: is long"),
        ("The name: of nothing", "The name: of nothing"),
    ],
)
def test_fields_are_options(message: str, expected: str) -> None:
    assert told(InvalidRequest("invalid_request", message, status=400)) == expected


def test_routes_are_not_named() -> None:
    missing = NotFound("not_found", "There is no such route; see /docs", status=404)
    assert "/docs" not in told(missing)


@pytest.mark.parametrize("kind", [ClientError, ConnectionFailed])
def test_errors_of_the_client_stay_as_they_are(kind: type[ClientError]) -> None:
    assert told(kind("name: as it is")) == "name: as it is"
