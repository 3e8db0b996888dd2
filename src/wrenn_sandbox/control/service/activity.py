"""When each sandbox and API key was used last, and which sandboxes are being used right now.

Kept in memory and written to the store every few seconds: the hot path costs no write.
"""

from collections import Counter
from collections.abc import Iterator, Set
from contextlib import contextmanager
from datetime import datetime

from wrenn_sandbox.aio import every
from wrenn_sandbox.control.clock import Clock
from wrenn_sandbox.control.store import Store
from wrenn_sandbox.ids import KeyId, SandboxId, TeamId

_INTERVAL = 2.0


class Activity:
    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._users: dict[SandboxId, Counter[TeamId]] = {}
        self._unsaved: dict[SandboxId, datetime] = {}
        self._unsaved_keys: dict[KeyId, datetime] = {}

    @contextmanager
    def using(self, sandbox_id: SandboxId, team_id: TeamId) -> Iterator[None]:
        """Counts as activity of this team from the beginning to the end of the block.

        To be entered before the team's right to the sandbox is checked, since a pause that begins
        after that check has to see it: so it counts for nothing where the team has none.
        """
        users = self._users.setdefault(sandbox_id, Counter())
        users[team_id] += 1
        try:
            yield
        finally:
            users[team_id] -= 1
            if not users[team_id]:
                del users[team_id]
            if not users:
                self._users.pop(sandbox_id, None)

    def touch(self, sandbox_id: SandboxId) -> None:
        self._unsaved[sandbox_id] = self._clock()

    def touch_key(self, key_id: KeyId, at: datetime) -> None:
        self._unsaved_keys[key_id] = at

    def users_of(self, sandbox_id: SandboxId) -> Set[TeamId]:
        """The teams that use, or try to use, a sandbox right now."""
        return self._users.get(sandbox_id, Counter()).keys()

    def latest(self, sandbox_id: SandboxId, saved: datetime | None) -> datetime | None:
        """The last activity, given what the store says of it."""
        unsaved = self._unsaved.get(sandbox_id)
        if unsaved is None or saved is None:
            return unsaved or saved
        return max(unsaved, saved)

    async def run(self) -> None:
        await every(_INTERVAL, self.save, complaint="activity not saved")

    async def save(self) -> None:
        """Write what has changed since the last time."""
        changed = dict(self._unsaved)
        if changed:
            await self._store.all_sandboxes.touch(changed)
        for sandbox_id, at in changed.items():
            if self._unsaved.get(sandbox_id) == at:
                del self._unsaved[sandbox_id]
        keys, self._unsaved_keys = self._unsaved_keys, {}
        if keys:
            await self._store.keys.touch(keys)
