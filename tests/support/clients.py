"""Published clients of other APIs, each in an environment of its own that is made once.

The locks are beside the scenarios in `tests/e2b_api/clients`. An environment is kept beside the
data directory's cache by the content of its lock, and by what runs it.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

CLIENTS = Path(__file__).parents[1] / "e2b_api" / "clients"
_LOCKS = CLIENTS / "locks"
_BUILD_SEC = 300


@dataclass(frozen=True)
class Published:
    """A client: `NAME-VERSION`, and the least version of what runs it."""

    name: str
    least: tuple[int, ...]

    @property
    def is_python(self) -> bool:
        return self.name.startswith(("python", "wrenn"))

    def environment(self) -> "Environment":
        """Where it is installed; the test is skipped where this machine cannot run it."""
        program = _python(self.least) if self.is_python else _node(self.least)
        if program is None:
            kind = "Python" if self.is_python else "Node.js"
            needed = ".".join(map(str, self.least))
            pytest.skip(f"{self.name} needs {kind} {needed} or newer, and this machine has none")
        lock = _LOCKS / (f"{self.name}.txt" if self.is_python else f"{self.name}/package-lock.json")
        digest = hashlib.sha256(lock.read_bytes() + _version(program).encode()).hexdigest()
        directory = _kept_in() / f"{self.name}-{digest[:16]}"
        with _alone(directory):
            if not (directory / "made").exists():
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(parents=True)
                if self.is_python:
                    _install_python(program, lock, directory)
                else:
                    _install_node(lock.parent, directory)
                (directory / "made").touch()
        return Environment(program, directory)


@dataclass(frozen=True)
class Environment:
    """`program` is the interpreter that the client was installed for."""

    program: str
    directory: Path

    @property
    def python(self) -> str:
        return str(self.directory / "venv/bin/python")


def outcomes(argv: list[str], variables: Mapping[str, str], seconds: float) -> dict[str, str]:
    """What a scenario says of each feature."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("E2B_", "WRENN_"))
    }
    ended = subprocess.run(
        argv,
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**environment, **variables},
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, ended.stderr
    return {line["feature"]: line["outcome"] for line in lines}


def _kept_in() -> Path:
    default = Path(__file__).parents[2] / ".dev"
    return Path(os.environ.get("WRENN_DATA_DIR", default)) / "clients"


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Two workers make no environment at the same time."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install_python(program: str, lock: Path, directory: Path) -> None:
    uv = [str(Path(sys.executable).with_name("uv")), "--quiet"]
    _run([*uv, "venv", "--python", program, str(directory / "venv")])
    python = str(directory / "venv/bin/python")
    _run([*uv, "pip", "install", "--python", python, "--require-hashes", "-r", str(lock)])


def _install_node(lock: Path, directory: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(lock / name, directory)
    _run(["npm", "ci", "--silent", "--no-audit", "--ignore-scripts", "--prefix", str(directory)])


def _run(argv: list[str]) -> None:
    ended = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=_BUILD_SEC)
    assert ended.returncode == 0, f"{argv}: {ended.stdout}{ended.stderr}"


def _python(least: tuple[int, ...]) -> str | None:
    """The program of a Python of this version or a newer one, a pyenv's too."""
    major, minor = least
    names = [f"python{major}.{each}" for each in range(minor, minor + 4)]
    managed = Path.home().glob(f".pyenv/versions/{major}.*/bin/python{major}")
    return _first(["/usr/bin/python3", *names, *map(str, sorted(managed))], least)


def _node(least: tuple[int, ...]) -> str | None:
    return _first(["node"], least) if shutil.which("npm") else None


def _first(programs: list[str], least: tuple[int, ...]) -> str | None:
    for name in programs:
        program = shutil.which(name)
        if program is not None and _numbers(_version(program)) >= least:
            return program
    return None


def _version(program: str) -> str:
    """What a program says of its version; nothing where it does not run."""
    ended = subprocess.run([program, "--version"], check=False, capture_output=True, text=True)
    return ended.stdout.strip() if ended.returncode == 0 else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
