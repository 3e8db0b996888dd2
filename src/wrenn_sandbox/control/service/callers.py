"""Who asks, and whether they still may: connections end soon after their credential does."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from wrenn_sandbox.aio import every
from wrenn_sandbox.control.store import Store
from wrenn_sandbox.ids import KeyId, TeamId

from .tokens import Claims

_INTERVAL = 2.0


@dataclass(frozen=True, slots=True)
class Caller:
    """The team for which somebody acts, and by which key or token."""

    team_id: TeamId
    credential: KeyId | Claims


class Revocations:
    """Looks every two seconds whether the credentials of open connections still count.

    A token that expires meanwhile ends nothing: a connection lasts as long as its work. One that
    was revoked, or whose user was disabled, does, and so does a key that was deleted.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: dict[Caller, set[asyncio.Event]] = {}

    @contextmanager
    def following(self, caller: Caller) -> Iterator[asyncio.Event]:
        """An event that is set when the caller's credential does not count any more."""
        revoked = asyncio.Event()
        self._open.setdefault(caller, set()).add(revoked)
        try:
            yield revoked
        finally:
            self._open[caller].discard(revoked)
            if not self._open[caller]:
                del self._open[caller]

    async def run(self) -> None:
        await every(_INTERVAL, self.sweep, complaint="credentials in use not checked")

    async def sweep(self) -> None:
        """Ask the store once for each credential that is in use."""
        for caller in list(self._open):
            if not await self._counts(caller):
                for revoked in self._open.get(caller, ()):
                    revoked.set()

    async def _counts(self, caller: Caller) -> bool:
        match caller.credential:
            case Claims(user_id, team_id, issued_at):
                return await self._store.accounts.may_act(user_id, team_id, issued_at)
            case key_id:
                return await self._store.keys.counts(key_id)
