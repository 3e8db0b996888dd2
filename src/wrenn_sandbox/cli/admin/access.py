"""The way of `wrenn admin` to the server's database, with the server's own settings."""

import asyncio
import os
import pwd
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeVar

from wrenn_sandbox.control.clock import utc_now
from wrenn_sandbox.control.store.administration import Administration, administration
from wrenn_sandbox.settings import ControlSettings

Result = TypeVar("Result")


def administer(work: Callable[[Administration], Awaitable[Result]]) -> Result:
    """Do `work` in the database; a server that uses it at the same time is not disturbed."""

    async def run() -> Result:
        async with administration(ControlSettings().sql_url, _operator()) as found:
            return await work(found)

    return asyncio.run(run())


def now() -> datetime:
    return utc_now()


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
