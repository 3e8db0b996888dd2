"""The server's messages in the words of the command line."""

import pytest
import typer

from wrenn_sandbox.cli import main as cli
from wrenn_sandbox.cli.advice import told
from wrenn_sandbox.cli.sandbox.exec import own_failures
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


def test_errors_do_not_move_the_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of a sandbox's files may be in them."""

    def fail() -> None:
        raise ClientError("a\x1b[2J\nb: No space left on device")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == "wrenn: a\ufffd[2J\ufffdb: No space left on device"
    with pytest.raises(typer.Exit), own_failures():
        fail()
    assert capsys.readouterr().err == "wrenn: a\ufffd[2J\ufffdb: No space left on device\n"
