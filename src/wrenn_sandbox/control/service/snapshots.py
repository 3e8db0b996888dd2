"""Templates made of sandboxes, which end with it or stay.

A sandbox that stays is in no state of its own meanwhile. The row of the snapshot under way protects
name and image and lets one at a time be made of a sandbox; the host does one thing after the other
with it. So a pause or a resume waits for the copy and needs not be refused.
"""

import base64
from dataclasses import dataclass
from typing import Final

from wrenn_sandbox.control.store.records import SnapshotIntent, TeamTemplate
from wrenn_sandbox.control.store.sandboxes import Change, Missing
from wrenn_sandbox.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    InvalidRequest,
    InvalidState,
    NotFound,
)
from wrenn_sandbox.ids import ImageId, TeamId, new_operation_id, new_random
from wrenn_sandbox.model.sandbox import Event, IllegalTransition
from wrenn_sandbox.model.template import TemplateType, is_template_name

from .context import ControlContext
from .images import DiscardedImages
from .lifecycle import WANTED, reason_of, refusals, require
from .sandboxes import sandbox_id_of
from .templates import Listed, Templates

REASON = "snapshotted"


@dataclass(frozen=True, slots=True)
class _Events:
    """What happens to the source while a template is made of it."""

    begin: Event
    made: Event
    failed: Event


_ENDING: Final = _Events(Event.SNAPSHOT, Event.SNAPSHOTTED, Event.SNAPSHOT_FAILED)
_STAYING: Final = _Events(Event.CHECKPOINT, Event.CHECKPOINTED, Event.CHECKPOINT_FAILED)


class SnapshotService:
    def __init__(
        self,
        context: ControlContext,
        templates: Templates,
        images: DiscardedImages,
    ) -> None:
        self._store = context.store
        self._host = context.host
        self._operations = context.operations
        self._templates = templates
        self._images = images
        self._wakeups = context.wakeups
        self._metrics = context.metrics
        self._clock = context.clock

    async def create(
        self,
        team_id: TeamId,
        image_id: ImageId,
        *,
        sandbox_id: str,
        name: str | None,
        overwrite: bool,
    ) -> TeamTemplate:
        """Turn a running sandbox into a template, with an image of this new id.

        Raises `InvalidRequest` for the name, `AlreadyExists` when it is taken, `InvalidState`
        when the sandbox does not run.
        """
        return await self._make(_ENDING, team_id, image_id, sandbox_id, name, overwrite=overwrite)

    async def checkpoint(
        self,
        team_id: TeamId,
        image_id: ImageId,
        *,
        sandbox_id: str,
        name: str | None,
        overwrite: bool,
    ) -> TeamTemplate:
        """Make a template of a running or paused sandbox, which stays as it is; raises as above."""
        return await self._make(_STAYING, team_id, image_id, sandbox_id, name, overwrite=overwrite)

    async def _make(
        self,
        events: _Events,
        team_id: TeamId,
        image_id: ImageId,
        sandbox_id: str,
        name: str | None,
        *,
        overwrite: bool,
    ) -> TeamTemplate:
        if name is not None and not is_template_name(name):
            raise InvalidRequest(
                "name must be 1 to 64 letters, digits, dots, underscores or hyphens "
                "and begin with a letter or digit"
            )
        sandbox = await self._store.team(team_id).sandboxes.get(sandbox_id_of(sandbox_id))
        if sandbox is None:
            raise NotFound("There is no such sandbox")
        chosen = name or self._automatic_name()
        if await self._templates.is_base(chosen):
            raise AlreadyExists(f"{chosen} is the name of a base template; choose another")
        require(sandbox, events.begin)
        intent = SnapshotIntent(
            team_id=team_id,
            name=chosen,
            sandbox_id=sandbox.id,
            operation_id=new_operation_id(),
            image_id=image_id,
        )
        work = self._made(events, intent, overwrite=overwrite)
        timing = self._metrics.operation("snapshot" if events is _ENDING else "checkpoint")
        return await self._operations.run(sandbox.id, work, timing=timing)

    async def made(self, team_id: TeamId, image_id: ImageId) -> TeamTemplate | None:
        """What came of a create with this image whose answer was lost, None where it has failed.

        Raises `Conflict` where that is not known yet.
        """
        template = await self._store.team(team_id).templates.of_image(image_id)
        intents = [] if template else await self._store.snapshots.intents()
        if any(intent.image_id == image_id for intent in intents):
            raise Conflict(
                "The server was interrupted while it made this template; try again", retry_after=1
            )
        return template

    async def page(self, team_id: TeamId, kind: TemplateType | None) -> list[Listed]:
        return await self._templates.page(team_id, kind)

    async def named(self, team_id: TeamId, name: str) -> Listed:
        """One of the templates that a team may use; raises `NotFound`."""
        return await self._templates.named(team_id, name)

    async def delete(self, team_id: TeamId, name: str) -> None:
        """Give up one of the team's names; raises `NotFound`, `Forbidden` for a base template."""
        known = is_template_name(name)
        if known and await self._store.team(team_id).templates.remove(name, self._clock()):
            await self._images.remove()
            return
        if known and await self._templates.is_base(name):
            raise Forbidden("Base templates belong to the host; they cannot be deleted here")
        raise NotFound("There is no such template; the list of templates has their names")

    async def _made(
        self, events: _Events, intent: SnapshotIntent, *, overwrite: bool
    ) -> TeamTemplate:
        ends = events is _ENDING
        begun = None if ends else f"the snapshot {intent.name} was asked for"
        made = REASON if ends else f"the snapshot {intent.name} was made"
        with refusals(WANTED[events.begin]):
            await self._store.snapshots.begin(
                intent, self._change(events.begin, begun), overwrite=overwrite
            )
        make = self._host.snapshot if ends else self._host.checkpoint
        try:
            image = await make(intent.sandbox_id, intent.operation_id, intent.image_id)
        except Exception as error:
            await self._abandon(intent, self._change(events.failed, reason_of(error)))
            self._wakeups.reconciler.set()
            raise
        try:
            template = await self._store.snapshots.complete(
                intent, image, self._change(events.made, made)
            )
        except (IllegalTransition, Missing) as error:
            await self._abandon(intent, None)
            raise InvalidState("The sandbox was deleted meanwhile") from error
        await self._images.remove()
        return template

    async def _abandon(self, intent: SnapshotIntent, change: Change | None) -> None:
        await self._store.snapshots.abandon(intent, change, self._clock())
        await self._images.remove()

    def _change(self, event: Event, reason: str | None) -> Change:
        return Change(event, "user", self._clock(), reason)

    def _automatic_name(self) -> str:
        return "template-" + base64.b32encode(new_random(5)).decode("ascii").lower()
