"""Fixtures that several folders share, and what holds for whole folders."""

import pytest

pytest_plugins = ["support.servers"]

_GUARDED = {"api", "contract", "oauth", "store", "system"}
"""Folders whose tests run the application in their own event loop."""


@pytest.fixture(autouse=True)
def guarded(request: pytest.FixtureRequest) -> None:
    """The application never blocks the loop, and writes no logs between the dots."""
    if request.path.parent.name in _GUARDED:
        request.getfixturevalue("no_blocking_calls")
        request.getfixturevalue("quiet_logs")
