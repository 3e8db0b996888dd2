"""The way of `wrenn admin` to the server's database, with the server's own settings."""

import asyncio
import os
import pwd
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from wrenn_sandbox.settings import ControlSettings

if TYPE_CHECKING:
    from wrenn_sandbox.control.store.administration import Administration

Result = TypeVar("Result")


def administer(work: Callable[["Administration"], Awaitable[Result]]) -> Result:
    """Do `work` in the database; a server that uses it at the same time is not disturbed."""
    # It takes a moment to import, and `wrenn --help` does without.
    from wrenn_sandbox.control.store.administration import administration

    async def run() -> Result:
        async with administration(ControlSettings().sql_url, _operator()) as found:
            return await work(found)

    return asyncio.run(run())


def _operator() -> str:
    """Who has logged in to this machine, else as whom the command runs."""
    try:
        return os.getlogin()
    except OSError:
        pass
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
