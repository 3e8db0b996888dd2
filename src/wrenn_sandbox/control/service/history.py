"""What a team's sandboxes used and wrote to their consoles, ended ones too."""

from wrenn_sandbox.errors import InvalidRequest, NotFound
from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.wire.messages import LogLine, Samples

from .calls import ConcurrencyLimiter
from .context import ControlContext
from .sandboxes import sandbox_id_of

SHOWN_SEC = 3600
"""How long a time is shown where nobody says since when."""


class HistoryService:
    """Reading is no activity of a sandbox."""

    def __init__(self, context: ControlContext, calls: ConcurrencyLimiter) -> None:
        self._store = context.store
        self._host = context.host
        self._clock = context.clock
        self._calls = calls

    async def samples(
        self, team_id: TeamId, sandbox_id: str, start: int | None, end: int | None
    ) -> Samples:
        """What a sandbox used between two moments in Unix seconds; raises `InvalidRequest`.

        By default until now, and for an hour.
        """
        end = round(self._clock().timestamp()) if end is None else end
        start = max(0, end - SHOWN_SEC) if start is None else start
        if start > end:
            raise InvalidRequest("start: must not be later than end, which is now by default")
        known = await self._known(team_id, sandbox_id)
        with self._calls.acquire(team_id, known):
            return await self._host.samples(known, start, end)

    async def recent(self, team_id: TeamId, sandbox_id: str, seconds: int) -> Samples:
        """What a sandbox used in so many seconds until now."""
        now = round(self._clock().timestamp())
        return await self.samples(team_id, sandbox_id, now - seconds, now)

    async def log(
        self, team_id: TeamId, sandbox_id: str, cursor: int | None, *, backward: bool, limit: int
    ) -> list[LogLine]:
        """Lines of a sandbox's console; see `Host.log`."""
        known = await self._known(team_id, sandbox_id)
        with self._calls.acquire(team_id, known):
            return await self._host.log(known, cursor, backward=backward, limit=limit)

    async def _known(self, team_id: TeamId, sandbox_id: str) -> SandboxId:
        known = sandbox_id_of(sandbox_id)
        if await self._store.team(team_id).sandboxes.life(known) is None:
            raise NotFound("There is no such sandbox")
        return known
