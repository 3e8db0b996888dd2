"""`./dev`: a signal to it reaches what it runs."""

import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

_ROOT = Path(__file__).parents[2]
_LOCKS = ("requirements-build.lock", "requirements.lock", "pyproject.toml")
_WRENN = """\
#!/bin/sh
echo $$ "$@"
[ "$1" != template ] || { echo "$WRENN_DATA_DIR"; exit; }
exec sleep 60
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """One that is set up, with a `wrenn` that tells its process id and arguments."""
    shutil.copy(_ROOT / "dev", tmp_path)
    for name in _LOCKS:
        (tmp_path / name).write_text(name)
    program = tmp_path / ".venv/bin/wrenn"
    program.parent.mkdir(parents=True)
    program.write_text(_WRENN)
    program.chmod(0o755)
    version = subprocess.run(["/usr/bin/python3", "-VV"], capture_output=True, check=True).stdout
    digest = hashlib.sha256("".join(_LOCKS).encode() + version).hexdigest()
    promtool = tmp_path / ".dev/prometheus/usr/bin/promtool"
    promtool.parent.mkdir(parents=True)
    promtool.write_text("")
    promtool.chmod(0o755)
    (tmp_path / ".dev/python").write_text(digest)
    return tmp_path


@pytest.fixture
def serving(checkout: Path) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [checkout / "dev", "serve", "--port", "1"],
        env={**os.environ, "WRENN_DATA_DIR": str(checkout / "data")},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def test_a_signal_reaches_the_server(serving: "subprocess.Popen[str]") -> None:
    assert serving.stdout is not None
    assert (
        serving.stdout.readline() == f"{serving.pid} serve --build minimal --build base --port 1\n"
    )
    serving.terminate()
    assert serving.wait(10) == -signal.SIGTERM


def test_templates_are_built_where_the_server_looks(checkout: Path, tmp_path: Path) -> None:
    data_dir = str(tmp_path / "its data")
    done = subprocess.run(
        [checkout / "dev", "template", "build", "developer"],
        env={**os.environ, "WRENN_DATA_DIR": data_dir},
        capture_output=True,
        text=True,
        check=True,
    )
    said, place = done.stdout.splitlines()
    assert (said.split()[1:], place) == (["template", "build", "developer"], data_dir)


def test_benchmarks_under_kvm_are_the_labs(checkout: Path) -> None:
    python = checkout / ".venv/bin/python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        [checkout / "dev", "bench", "--lab", "start", "--rounds", "3"],
        env={**os.environ, "WRENN_DATA_DIR": str(checkout / "data")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("-m lab --packages ")
    assert done.stdout.endswith(" bench start --rounds 3\n")


def test_benchmarks_say_how_they_are_called_without_a_template(checkout: Path) -> None:
    python = checkout / ".venv/bin/python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        [checkout / "dev", "bench", "--help"],
        env={**os.environ, "WRENN_DATA_DIR": str(checkout / "data")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "-m bench --help\n"


_PYTHON = """\
#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in *"-m lab"*"run -- true") exit "$LAB_STATUS";; esac
"""


def _tested(checkout: Path, *options: str, lab_status: int = 0) -> tuple[int, str, list[str]]:
    """`./dev test` with a Python that does nothing: its status, its output, and what ran."""
    programs, calls = checkout / ".venv/bin", checkout / "calls"
    for name in ("python", "ruff", "mypy", "lint-imports"):
        (programs / name).write_text(_PYTHON)
        (programs / name).chmod(0o755)
    (checkout / ".ci").mkdir()
    (checkout / ".ci/run").touch()
    done = subprocess.run(
        [checkout / "dev", "test", *options],
        env={
            **os.environ,
            "WRENN_DATA_DIR": str(checkout / "data"),
            "TMPDIR": str(checkout),
            "CALLS": str(calls),
            "LAB_STATUS": str(lab_status),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    ran = [line for line in calls.read_text().splitlines() if " -m lab " in f" {line} "]
    return done.returncode, done.stdout + done.stderr, [line.split()[-1] for line in ran]


def test_all_tests_end_in_the_lab(checkout: Path) -> None:
    status, _, ran = _tested(checkout)
    assert (status, ran) == (0, ["true", "--chosen"])


def test_tests_can_leave_the_lab_out(checkout: Path) -> None:
    status, _, ran = _tested(checkout, "--no-lab")
    assert (status, ran) == (0, [])


def test_a_lab_without_a_host_fails_the_tests(checkout: Path) -> None:
    status, said, ran = _tested(checkout, lab_status=1)
    assert (status, ran) == (1, ["true"])
    assert "the lab has no host" in said
