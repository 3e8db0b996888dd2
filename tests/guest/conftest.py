from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.agent_process import Agent


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """One agent for the tests of a module; it stays alive and has nothing to complain about."""
    agent = Agent(tmp_path_factory.mktemp("home"))
    yield agent
    alive = agent.process.poll() is None
    console = agent.stop()
    assert alive
    assert console == ""


@pytest.fixture
def fresh_agent(tmp_path: Path) -> Iterator[Agent]:
    """An agent for one test alone, to set tokens and defaults."""
    agent = Agent(tmp_path)
    yield agent
    assert agent.stop() == ""
