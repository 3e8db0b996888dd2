"""Fixtures that several folders share, and what holds for whole folders."""

import hypothesis
import pytest

from wrenn_sandbox.patience import slowness

pytest_plugins = ["support.servers"]

# Runs as root would leave examples in the checkout that nobody else may change.
hypothesis.settings.register_profile("wrenn", database=None)
hypothesis.settings.load_profile("wrenn")

_GUARDED = {"api", "contract", "e2b_api", "monitoring", "oauth", "store", "system"}
"""Folders whose tests run the application in their own event loop."""
_SLOW = {"contract", "host_agent", "security", "system"}
"""Folders whose tests start whole hosts, or try a great many inputs."""
_OF_THE_MACHINE = {"network", "privileged"}
"""Folders whose tests make and compare namespaces, tables and groups of the whole machine."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-tables",
        action="store_true",
        help="write what published clients do into docs/e2b.md, instead of comparing it",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A test may take longer on a slow machine; workers are told so by who starts them."""
    if not hasattr(config, "workerinput"):
        config.option.timeout *= slowness()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in _OF_THE_MACHINE:
            item.add_marker("serial")
            item.add_marker("root")
        if item.path.parent.name in _SLOW:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def guarded(request: pytest.FixtureRequest) -> None:
    """The application never blocks the loop, and writes no logs between the dots."""
    if request.path.parent.name in _GUARDED:
        request.getfixturevalue("no_blocking_calls")
        request.getfixturevalue("quiet_logs")
