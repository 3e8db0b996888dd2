"""One real server for all VM tests, one sandbox for each module that asks for one."""

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from support.vm.rig import Api, NewRig, Rig, Sandbox, rig_of
from support.vm.world import World, world_of
from wrenn_sandbox.settings import Settings


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the template when machines will be booted; no test's time limit counts that."""
    if session.config.option.collectonly or not any(
        each.get_closest_marker("vm") for each in session.items
    ):
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        subprocess.run(
            [sys.executable, "-m", "wrenn_sandbox", "template", "build", "minimal"], check=True
        )


@pytest.fixture(scope="session")
def images() -> Path:
    """A data directory that holds the `minimal` template."""
    return Settings().data_dir


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


@pytest.fixture
async def world(images: Path) -> AsyncIterator[World]:
    """A host agent of a test's own, in its process."""
    async with world_of(images) as world:
        yield world


@pytest.fixture(scope="module")
def api(rig: Rig) -> Iterator[Api]:
    with contextlib.closing(Api(rig.server)) as api:
        yield api


@pytest.fixture(scope="module")
def sandbox(api: Api) -> Sandbox:
    """A machine that the tests of one module share."""
    return api.create()
