"""What systemd learns of a service of type `notify`: sd_notify(3), with its watchdog."""

import asyncio
import os
import socket
from typing import Final

import structlog

from wrenn_sandbox.settings import ServiceSettings

_log = structlog.get_logger(__name__)
_TELL_SEC: Final = 1.0


class Service:
    """This process as a service; it tells nobody anything where systemd did not ask for it."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._address = settings.notify_socket
        watched = settings.watchdog_pid in (None, os.getpid())
        self._watchdog_sec = settings.watchdog_usec / 1e6 if watched else 0.0
        self._ready = asyncio.Event()

    def ready(self) -> None:
        self._tell("READY=1")
        self._ready.set()

    def stopping(self) -> None:
        self._tell("STOPPING=1")

    async def keep_alive(self) -> None:
        """Tell the watchdog, twice in its interval, that the event loop turns; until cancelled.

        It does not watch before the service is ready.
        """
        await self._ready.wait()
        while self._watchdog_sec:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_sec / 2)

    def _tell(self, state: str) -> None:
        if self._address is None:
            return
        name = self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_TELL_SEC)
                sender.sendto(state.encode(), "\0" + name[1:] if name.startswith("@") else name)
        except OSError as error:
            _log.warning("systemd was not told", state=state, reason=str(error))
