"""Whoever comes to a port of a sandbox: may they, and does it run? If it may be resumed, it is."""

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Final

from wrenn_sandbox.aio import ended
from wrenn_sandbox.control.store.sandboxes import Exposed, Life
from wrenn_sandbox.errors import InvalidState, NoCapacity, NotFound, WrennError
from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.model.sandbox import State
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.guest import Guest

from .calls import ConcurrencyLimiter
from .context import ControlContext
from .guests import GuestService
from .lifecycle import Lifecycle, not_possible
from .sandboxes import sandbox_id_of

TRAFFIC: Final = "traffic"
"""The actor of what requests to ports do."""

AWAKE_SEC: Final = 300
"""A sandbox that was resumed by a request gets no deadline that is nearer."""

KEPT_PER_SANDBOX: Final = 64
KEPT_PER_TEAM: Final = 256
"""Connections to guests that rest between two requests."""

KNOWN_SEC: Final = 1.0
_KNOWN_LIMIT: Final = 4096
"""What this store writes ends what is known at once; what another process does, a second later."""

_WAKE_SEC: Final = 120.0
_POLL_SEC: Final = 0.05
_FAILED_SEC: Final = 5.0
"""For so long requests are told of a failed resume, instead of trying again."""

_WANTED: Final = "only the ports of a running sandbox can be reached"
_ON_ITS_WAY: Final = (State.STARTING, State.PAUSING, State.RESUMING, State.ROLLING_BACK)


class PortService:
    """`secret` is the installation's: the tokens of sandboxes follow from it."""

    def __init__(
        self, context: ControlContext, guests: GuestService, lifecycle: Lifecycle, secret: str
    ) -> None:
        self._store = context.store
        self._guests = guests
        self._lifecycle = lifecycle
        self._secret = secret.encode()
        self._limits = {
            trusted: ConcurrencyLimiter(
                per_sandbox=context.settings.port_connections_per_sandbox,
                per_team=context.settings.port_connections_per_team,
                name="port_connections",
                what="requests to ports",
            )
            for trusted in (False, True)
        }
        self._kept = ConcurrencyLimiter(
            per_sandbox=KEPT_PER_SANDBOX,
            per_team=KEPT_PER_TEAM,
            what="connections to ports that rest",
        )
        self._known: dict[SandboxId, tuple[Exposed, float]] = {}
        """Sandboxes that run, and when that was read."""
        self._changes = 0
        self._store.listen(self._note)
        self._wakings: dict[SandboxId, asyncio.Task[Exposed]] = {}
        self._failures: dict[SandboxId, WrennError] = {}
        self.domain = context.settings.domain
        """Under which each port has a host name of its own."""
        self.idle_sec = context.settings.port_idle_sec
        """Seconds without a byte in either direction after which a connection is cut."""

    def agent_token(self, sandbox_id: SandboxId) -> str:
        """What a client shows to speak to a sandbox's agent; the same in all its lives."""
        return self._token("agent", sandbox_id)

    def traffic_token(self, sandbox_id: SandboxId) -> str:
        """What a client shows to reach private ports of a sandbox; the same in all its lives."""
        return self._token("traffic", sandbox_id)

    async def close(self) -> None:
        """Let nobody wait any more; a resume that is under way goes on."""
        await ended(self._wakings.values(), 0)

    async def find(self, sandbox_id: str, team_id: TeamId | None = None) -> Exposed:
        """A sandbox by its id, of this team only where one is given; raises `NotFound`."""
        found = await self._find(sandbox_id_of(sandbox_id))
        if found is None or team_id not in (None, found.team_id):
            raise NotFound("There is no such sandbox")
        return found

    async def _find(self, sandbox_id: SandboxId) -> Exposed | None:
        now = asyncio.get_running_loop().time()
        known, read_at = self._known.get(sandbox_id, (None, now))
        if known is not None and now - read_at < KNOWN_SEC:
            return known
        changes = self._changes
        found = await self._store.all_sandboxes.exposed(sandbox_id)
        if found is not None and found.state is State.RUNNING and changes == self._changes:
            if len(self._known) >= _KNOWN_LIMIT:
                self._known.clear()
            self._known[sandbox_id] = found, now
        return found

    def _note(self, _: TeamId) -> None:
        """Something has changed; what is being read may be older."""
        self._changes += 1
        self._known.clear()

    def keeping(self, sandbox: Exposed) -> AbstractContextManager[None]:
        """A connection to a guest that rests between two requests; raises `QuotaExceeded`."""
        return self._kept.acquire(sandbox.team_id, sandbox.id)

    @asynccontextmanager
    async def using(self, sandbox: Exposed, *, trusted: bool) -> AsyncIterator[Guest]:
        """The guest of a sandbox, in use until the end of the block; it is resumed if it may be.

        Who has shown a credential (`trusted`) is not counted with strangers, so that these cannot
        take all places. Where ports are private a stranger resumes nothing and is no activity.
        Raises what `GuestService.using` raises, and what a resume raises.
        """
        with self._limits[trusted].acquire(sandbox.team_id, sandbox.id):
            only_watches = sandbox.private_ports and not trusted
            if sandbox.state is not State.RUNNING:
                if only_watches:
                    raise not_possible(sandbox.state, _WANTED)
                sandbox = await self._woken(sandbox)
            life = Life(sandbox.state, sandbox.started_at)
            use = self._guests.watching if only_watches else self._guests.using
            async with use(sandbox.team_id, sandbox.id, life=life) as guest:
                yield guest

    async def _woken(self, sandbox: Exposed) -> Exposed:
        """All who wait for a sandbox wait for one task: their number costs the store nothing."""
        task = self._wakings.get(sandbox.id)
        if task is None:
            task = asyncio.create_task(self._wake(sandbox), name=f"traffic to {sandbox.id}")
            self._wakings[sandbox.id] = task
            task.add_done_callback(lambda done: self._ended(sandbox.id, done))
        return await asyncio.shield(task)

    def _ended(self, sandbox_id: SandboxId, task: asyncio.Task[Exposed]) -> None:
        del self._wakings[sandbox_id]
        if not task.cancelled():
            task.exception()  # whoever waited may have left

    async def _wake(self, sandbox: Exposed) -> Exposed:
        try:
            async with asyncio.timeout(patience(_WAKE_SEC)):
                while sandbox.state is not State.RUNNING:
                    await self._come_nearer(sandbox)
                    sandbox = await self.find(sandbox.id)
                return sandbox
        except TimeoutError as error:
            raise NoCapacity("The sandbox is not resumed yet; try again", retry_after=5) from error

    async def _come_nearer(self, sandbox: Exposed) -> None:
        if not sandbox.auto_resume or sandbox.state not in (State.PAUSED, *_ON_ITS_WAY):
            raise not_possible(sandbox.state, _WANTED)
        if sandbox.state is not State.PAUSED:
            await asyncio.sleep(_POLL_SEC)
            return
        if sandbox.id in self._failures:
            raise self._failures[sandbox.id].with_traceback(None)
        try:
            await self._lifecycle.resume(sandbox.id, TRAFFIC, deadline_at_least_sec=AWAKE_SEC)
        except InvalidState:
            await asyncio.sleep(_POLL_SEC)  # somebody else was first
        except WrennError as error:
            self._failures[sandbox.id] = error
            loop = asyncio.get_running_loop()
            loop.call_later(_FAILED_SEC, self._failures.pop, sandbox.id, None)
            raise

    def _token(self, purpose: str, sandbox_id: SandboxId) -> str:
        return hmac.digest(self._secret, f"{purpose} of {sandbox_id}".encode(), "sha256").hex()
