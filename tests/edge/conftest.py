"""One server for the tests of a module."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from support.api_server import make_settings
from support.ports import Edge


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    settings = make_settings(tmp_path_factory.mktemp("edge") / "data", None)
    async with Edge.serving(settings) as edge:
        yield edge


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox(edge: Edge) -> str:
    """A running sandbox of that server, which no test ends."""
    return await edge.create()
