"""Which guests do not respond, and since when.

A healthy guest is never asked. A call that failed raises the suspicion; then the guest's agent is
asked whether it is there, for a few seconds at most, by one check for all who want to know. Those
that were silent are asked again every few seconds, until they respond or do not run any more.
"""

import asyncio
from datetime import datetime
from typing import Final

import structlog

from wrenn_sandbox.aio import every, shielded
from wrenn_sandbox.errors import AgentError, NotFound, NotResponding, WrennError
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.patience import patience

from .context import ControlContext

_log = structlog.get_logger(__name__)
_ACTOR: Final = "health"
_INTERVAL: Final = 10.0
_RETRY: Final = 0.1


class GuestHealth:
    """`check_sec` is how long a guest may take to say that it is there."""

    def __init__(self, context: ControlContext) -> None:
        self.check_sec = patience(context.settings.guest_check_sec)
        self._store = context.store.silences
        self._host = context.host
        self._metrics = context.metrics
        self._clock = context.clock
        self._silent: dict[SandboxId, datetime] = {}
        self._checks: dict[SandboxId, asyncio.Task[datetime | None]] = {}

    async def run(self) -> None:
        """Take up what the history says of silent guests, and ask them again and again."""
        try:
            try:
                self._silent |= await shielded(self._store.all())
                self._count()
            except Exception:
                _log.exception("silent guests not known")
            await every(_INTERVAL, self.sweep, complaint="silent guests not asked")
        finally:
            checks = list(self._checks.values())
            for check in checks:
                check.cancel()
            await asyncio.gather(*checks, return_exceptions=True)

    async def sweep(self) -> None:
        """Ask every guest that was silent when it was asked last."""
        await asyncio.gather(*(self._silent_since(each) for each in list(self._silent)))

    def suspect(self, sandbox_id: SandboxId) -> None:
        """Have a guest asked soon: something in it may have failed because it is not there."""
        self._check(sandbox_id)

    async def require(self, sandbox_id: SandboxId) -> None:
        """Raise `NotResponding` for a guest that was silent and still is."""
        if sandbox_id in self._silent:
            since = await self._silent_since(sandbox_id)
            if since is not None:
                raise not_responding(since)

    async def explained(self, sandbox_id: SandboxId, error: AgentError) -> AgentError:
        """What to say of a call that failed: `NotResponding` where that is why."""
        since = await self._silent_since(sandbox_id)
        return error if since is None else not_responding(since)

    async def _silent_since(self, sandbox_id: SandboxId) -> datetime | None:
        """Ask a guest; None where it answers, and where it does not run."""
        return await asyncio.shield(self._check(sandbox_id))

    def _check(self, sandbox_id: SandboxId) -> "asyncio.Task[datetime | None]":
        task = self._checks.get(sandbox_id)
        if task is None:
            task = asyncio.create_task(self._ask(sandbox_id), name=f"is {sandbox_id} there")
            self._checks[sandbox_id] = task
            task.add_done_callback(lambda _: self._checks.pop(sandbox_id))
        return task

    async def _ask(self, sandbox_id: SandboxId) -> datetime | None:
        asked = self._clock()
        try:
            answered = await self._answers(sandbox_id)
            return await shielded(self._note(sandbox_id, answered, asked))
        except WrennError as error:
            _log.warning("health of a guest not known", sandbox_id=sandbox_id, error=error.message)
        except Exception:
            _log.exception("health of a guest not known", sandbox_id=sandbox_id)
        return None

    async def _answers(self, sandbox_id: SandboxId) -> bool | None:
        """Whether a guest's agent is there; None where the sandbox does not run."""
        try:
            async with asyncio.timeout(self.check_sec):
                while True:
                    try:
                        await self._host.guest(sandbox_id).health()
                        return True
                    except NotFound:
                        return None
                    except NotResponding:
                        await asyncio.sleep(_RETRY)
        except TimeoutError:
            return False

    async def _note(
        self, sandbox_id: SandboxId, answered: bool | None, asked: datetime
    ) -> datetime | None:
        since = None
        if answered is False:
            reason = f"guest not responding since {written(asked)}"
            since = await self._store.begin(sandbox_id, reason, _ACTOR, asked)
        elif answered and sandbox_id in self._silent:
            reason = "the guest responds again"
            await self._store.end(sandbox_id, reason, _ACTOR, self._clock())
        if since is None:
            self._silent.pop(sandbox_id, None)
        else:
            if sandbox_id not in self._silent:
                self._metrics.guest_failure("not_responding")
            self._silent[sandbox_id] = since
        self._count()
        return since

    def _count(self) -> None:
        self._metrics.not_responding(len(self._silent))


def not_responding(since: datetime) -> NotResponding:
    return NotResponding(
        f"Guest not responding since {written(since)}. To have its files, pause the sandbox, then "
        'resume it without memory (`wrenn sandbox resume --reboot`, or {"memory": false} in the '
        "request); its processes end"
    )


def written(at: datetime) -> str:
    """A time as people read it, in UTC."""
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
