"""One real server for all VM tests, one sandbox for each module that asks for one."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from vm.harness import Api, Rig, Sandbox
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory
from wrenn_sandbox.testing.leftovers import settled
from wrenn_sandbox.testing.server_process import ServerProcess


class NewRig(Protocol):
    """Starts a server with these environment variables, and a team of it."""

    def __call__(self, **overrides: str) -> tuple[Rig, Api]: ...


@pytest.fixture(scope="session")
def images() -> Path:
    """A data directory that holds the `minimal` template, built when it is missing."""
    subprocess.run(
        [sys.executable, "-m", "wrenn_sandbox", "template", "build", "minimal"], check=True
    )
    return Settings().data_dir


@contextlib.contextmanager
def rig_of(images: Path, overrides: Mapping[str, str]) -> Iterator[Rig]:
    """A server of its own, of which nothing may be left in the end; it keeps no machines ready."""
    with working_directory(images, "test") as data_dir:
        variables = {"WRENN_HOT_POOL_SIZE": "0", **overrides}
        rig = Rig(ServerProcess(data_dir, data_dir / "server.log", variables), data_dir)
        try:
            with rig.server:
                yield rig
            left = settled(data_dir=data_dir)
        finally:
            rig.server.purge()
        assert left == set()


@pytest.fixture(scope="session")
def rig(images: Path) -> Iterator[Rig]:
    """The server that most tests share. It compares books rarely, so that events must do."""
    with rig_of(images, {"WRENN_RECONCILE_INTERVAL_SEC": "60"}) as rig:
        yield rig


@pytest.fixture
def new_rig(images: Path) -> Iterator[NewRig]:
    """Starts servers for one test; keyword arguments are environment variables."""
    with contextlib.ExitStack() as stack:

        def start(**overrides: str) -> tuple[Rig, Api]:
            rig = stack.enter_context(rig_of(images, overrides))
            return rig, stack.enter_context(contextlib.closing(Api(rig.server)))

        yield start


@pytest.fixture(scope="module")
def api(rig: Rig) -> Iterator[Api]:
    with contextlib.closing(Api(rig.server)) as api:
        yield api


@pytest.fixture(scope="module")
def sandbox(api: Api) -> Sandbox:
    """A machine that the tests of one module share."""
    return api.create()
