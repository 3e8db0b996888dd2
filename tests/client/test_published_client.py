"""The published `wrenn` client, unmodified, against this server.

It needs Python 3.13 and calls sandboxes capsules.
"""

import asyncio
from collections.abc import AsyncIterator

import pytest

from support.api_server import Server, Team
from support.listening import edge

pytestmark = pytest.mark.usefixtures("no_blocking_calls", "quiet_logs")

wrenn = pytest.importorskip("wrenn", reason="the published client needs Python 3.13 or newer")


@pytest.fixture(params=["sqlite"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """None of this depends on the database."""
    return None


@pytest.fixture
async def url(server: Server) -> AsyncIterator[str]:
    async with edge(server.app, server.settings) as served:
        yield served.url


async def test_the_published_client_works_with_directories(url: str, team: Team) -> None:
    def work() -> None:
        with wrenn.Capsule(base_url=url, api_key=team.key) as capsule:
            capsule.files.write("/tmp/published/one.txt", "one")
            capsule.files.make_dir("/tmp/published/two")
            listed = {each.name: each for each in capsule.files.list("/tmp/published")}
            assert sorted(listed) == ["one.txt", "two"]
            assert (listed["one.txt"].type, listed["one.txt"].size) == ("file", 3)
            assert listed["one.txt"].modified_at > 1_700_000_000
            assert capsule.files.read("/tmp/published/one.txt") == "one"
            capsule.files.remove("/tmp/published")
            assert not capsule.files.exists("/tmp/published")

    await asyncio.to_thread(work)


async def test_the_published_client_has_a_terminal(url: str, team: Team) -> None:
    script = b"stty -echo; stty size; printf 'a\\377'; read x; exit $x\n"

    def work() -> None:
        with wrenn.Capsule(base_url=url, api_key=team.key) as capsule:
            with capsule.pty(cmd="/bin/sh", cols=101, rows=31) as terminal:
                terminal.write(script)
                shown = b""
                for event in terminal:
                    if event.type == "output":
                        shown += event.data
                    if shown.endswith(b"31 101\r\na\xff"):
                        break
                tag = terminal.tag
            with capsule.pty_connect(tag) as terminal:
                terminal.resize(80, 24)
                terminal.write(b"6\n")
                shown = b""
                for event in terminal:
                    if event.type == "output":
                        shown += event.data
                    elif event.type != "started":
                        break
                assert b"a\xff" in shown, event
                assert (event.type, event.exit_code) == ("exit", 6)

    await asyncio.to_thread(work)
