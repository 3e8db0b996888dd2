"""When each sandbox was used last, and whether it is being used right now.

Kept in memory and written to the store every few seconds: the hot path costs no write.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from wrenn_sandbox.control.clock import Clock
from wrenn_sandbox.control.store import Store
from wrenn_sandbox.ids import SandboxId


class Activity:
    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._users: Counter[SandboxId] = Counter()
        self._unsaved: dict[SandboxId, datetime] = {}

    @contextmanager
    def using(self, sandbox_id: SandboxId) -> Iterator[None]:
        """Counts as activity from the beginning to the end of the block."""
        self._users[sandbox_id] += 1
        try:
            yield
        finally:
            self._users[sandbox_id] -= 1
            if not self._users[sandbox_id]:
                del self._users[sandbox_id]

    def touch(self, sandbox_id: SandboxId) -> None:
        self._unsaved[sandbox_id] = self._clock()

    def in_use(self, sandbox_id: SandboxId) -> bool:
        return sandbox_id in self._users

    def latest(self, sandbox_id: SandboxId, saved: datetime | None) -> datetime | None:
        """The last activity, given what the store says of it."""
        unsaved = self._unsaved.get(sandbox_id)
        if unsaved is None or saved is None:
            return unsaved or saved
        return max(unsaved, saved)

    async def save(self) -> None:
        """Write what has changed since the last time."""
        changed = dict(self._unsaved)
        if not changed:
            return
        await self._store.all_sandboxes.touch(changed)
        for sandbox_id, at in changed.items():
            if self._unsaved.get(sandbox_id) == at:
                del self._unsaved[sandbox_id]
