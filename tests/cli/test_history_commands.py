"""Commands that show what was: logs, metrics and use by day."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.served import Served, serving
from wrenn_sandbox.cli.main import app
from wrenn_sandbox.client import Sandbox
from wrenn_sandbox.host.journal import records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("history")


@pytest.fixture(scope="module")
def served(data_dir: Path) -> Iterator[Served]:
    with serving(data_dir) as served:
        yield served


@pytest.fixture
def sandbox(served: Served) -> Iterator[Sandbox]:
    with served.client() as client, client.sandboxes.create() as sandbox:
        yield sandbox


@pytest.fixture
def run(served: Served, tmp_path: Path) -> "Runner":
    return Runner(
        {
            "WRENN_URL": served.url,
            "WRENN_API_KEY": served.key,
            "XDG_CONFIG_HOME": str(tmp_path),
        }
    )


class Runner:
    """Runs commands as somebody who has a key."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment

    def __call__(self, *arguments: str, status: int = 0) -> str:
        done = CliRunner().invoke(app, arguments, env=self._environment)
        assert done.exit_code == status, done.output
        return done.output


def _say(data_dir: Path, sandbox: Sandbox, text: bytes) -> None:
    """What the guest would write to its console."""
    run = data_dir / "data" / "run"
    [record] = [each for each in records(run) if each.sandbox_id == sandbox.id]
    with (run / record.machine_id / "vmm.log").open("ab") as console:
        console.write(text)


def test_a_log_cannot_move_the_cursor_of_a_terminal(
    run: Runner, sandbox: Sandbox, data_dir: Path
) -> None:
    _say(data_dir, sandbox, b"first\n\x1b]0;title\x07\x1b[2J\xc2\x9b1m\xe2\x80\xaehi\n")
    lines = run("sandbox", "logs", "--lines", "1", sandbox.id).splitlines()
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert lines[0].endswith("1m\N{REPLACEMENT CHARACTER}hi")
    [line] = json.loads(run("sandbox", "logs", "-n", "1", "--json", sandbox.id))
    assert (line["source"], line["text"][:3]) == ("console", "\x1b]0")


def test_a_log_is_followed_to_the_end_of_its_sandbox(
    run: Runner, served: Served, data_dir: Path
) -> None:
    with served.client() as client:
        sandbox = client.sandboxes.create()
        _say(data_dir, sandbox, b"one\ntwo\nthree")
        sandbox.delete()
    shown = run("sandbox", "logs", "--follow", "--json", "--lines", "1", sandbox.id)
    assert [json.loads(line)["text"] for line in shown.splitlines()] == ["three"]
    shown = run("sandbox", "logs", "--follow", sandbox.id)
    assert [line.split()[-1] for line in shown.splitlines()][-3:] == [
        "one",
        "two",
        "three",
    ]


def test_metrics_of_now_and_of_before(run: Runner, sandbox: Sandbox) -> None:
    assert run("sandbox", "metrics", sandbox.id).startswith("CPU USED PCT")
    assert json.loads(run("sandbox", "metrics", "--json", sandbox.id))[0]["cpu_count"] >= 1
    history = json.loads(run("sandbox", "metrics", "--since", "2h", "--json", sandbox.id))
    assert history["step_sec"] == 60
    assert run("sandbox", "metrics", "--since", "15m", sandbox.id).startswith("TIME")
    for wrong in ("yesterday", "5", "-5m", "1.5h", "9999999d"):
        run("sandbox", "metrics", f"--since={wrong}", sandbox.id, status=2)


def test_use_now_and_by_day(run: Runner, sandbox: Sandbox) -> None:
    assert "running" in run("usage")
    assert json.loads(run("usage", "--json"))["used"]["running"] == 1
    today = datetime.now(UTC).date().isoformat()
    assert run("usage", "--by-day").splitlines()[-1].startswith(today)
    history = json.loads(run("usage", "--from", today, "--to", today, "--json"))
    assert [each["date"] for each in history["days"]] == [today]
    run("usage", "--from", "yesterday", status=2)
