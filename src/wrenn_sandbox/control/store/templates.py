"""A team's own templates, what is made of sandboxes, and images that nobody names any more."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime

from sqlalchemy import delete, insert, select, union
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.errors import AlreadyExists, Conflict
from wrenn_sandbox.ids import ImageId, SandboxId, TeamId
from wrenn_sandbox.model.events import SNAPSHOT_CREATED, SNAPSHOT_DELETED
from wrenn_sandbox.model.quota import check_disk, check_snapshots
from wrenn_sandbox.model.sandbox import IllegalTransition
from wrenn_sandbox.wire.messages import ImageInfo

from . import sandboxes
from .database import Database
from .quotas import QuotaTransaction
from .records import ForkImage, Sandbox, SnapshotIntent, TeamTemplate, values
from .tables import discarded_images, fork_images, snapshot_intents, templates
from .team_events import record_event


async def _discard(connection: AsyncConnection, team_id: TeamId, name: str, now: datetime) -> bool:
    removed = await connection.execute(
        delete(templates)
        .where(templates.c.team_id == team_id, templates.c.name == name)
        .returning(templates.c.image_id)
    )
    image_id = removed.scalar_one_or_none()
    if image_id is None:
        return False
    await connection.execute(insert(discarded_images).values(image_id=image_id, created_at=now))
    return True


async def _end(
    connection: AsyncConnection,
    sandbox_id: SandboxId,
    image_id: ImageId,
    change: sandboxes.Change | None,
    now: datetime,
) -> None:
    await connection.execute(insert(discarded_images).values(image_id=image_id, created_at=now))
    if change is not None:
        with suppress(sandboxes.Missing, IllegalTransition):
            await sandboxes.apply(connection, sandbox_id, change)


class TeamTemplates:
    """The templates of one team; those of others do not exist here."""

    def __init__(self, database: Database, team_id: TeamId, guard: QuotaTransaction) -> None:
        self._database = database
        self._team_id = team_id
        self._guard = guard

    async def all(self) -> list[TeamTemplate]:
        query = select(templates).where(templates.c.team_id == self._team_id)
        return await self._database.records(TeamTemplate, query)

    async def get(self, name: str) -> TeamTemplate | None:
        query = select(templates).where(
            templates.c.team_id == self._team_id, templates.c.name == name
        )
        return await self._database.record(TeamTemplate, query)

    async def of_image(self, image_id: ImageId) -> TeamTemplate | None:
        query = select(templates).where(
            templates.c.team_id == self._team_id, templates.c.image_id == image_id
        )
        return await self._database.record(TeamTemplate, query)

    async def remove(self, name: str, now: datetime) -> bool:
        """Give up a name and its image; false when there is none."""
        async with self._guard.write(self._team_id) as connection:
            found = await _discard(connection, self._team_id, name, now)
            if found:
                told = {"name": name, "actor": "user"}
                await record_event(connection, self._team_id, SNAPSHOT_DELETED, now, told)
            return found


class Snapshots:
    """Snapshots and forks under way, of every team."""

    def __init__(self, database: Database, guard: QuotaTransaction) -> None:
        self._database = database
        self._guard = guard

    async def begin(
        self, intent: SnapshotIntent, change: sandboxes.Change, *, overwrite: bool
    ) -> Sandbox:
        """Reserve the name and mark the sandbox, in one transaction.

        Raises `AlreadyExists` for a taken name, `Conflict` for one that is being taken,
        `Missing` or `IllegalTransition` for the sandbox, `QuotaExceeded` for the team.
        """
        checks = (check_snapshots, check_disk)
        taken = select(templates.c.name).where(
            templates.c.team_id == intent.team_id, templates.c.name == intent.name
        )
        try:
            async with self._guard.write(intent.team_id, *checks) as connection:
                await connection.execute(
                    insert(snapshot_intents).values(created_at=change.at, **values(intent))
                )
                if not overwrite and (await connection.execute(taken)).one_or_none() is not None:
                    raise AlreadyExists(
                        f"A template named {intent.name} exists; "
                        "choose another name or overwrite it"
                    )
                return await sandboxes.apply(connection, intent.sandbox_id, change)
        except IntegrityError as error:
            raise Conflict(
                f"Another snapshot of this sandbox or with the name {intent.name} is being made; "
                "try again when it is done"
            ) from error

    async def complete(
        self, intent: SnapshotIntent, image: ImageInfo, change: sandboxes.Change
    ) -> TeamTemplate:
        """Give the name to the new image, discard the old one's and apply `change`, at once."""
        template = TeamTemplate(
            name=intent.name,
            image_id=image.image_id,
            vcpus=image.vcpus,
            memory_mb=image.memory_mb,
            size_bytes=image.size,
            created_at=change.at,
            sandbox_id=intent.sandbox_id,
        )
        async with self._guard.write(intent.team_id) as connection:
            await _discard(connection, intent.team_id, intent.name, change.at)
            await connection.execute(
                insert(templates).values(team_id=intent.team_id, **values(template))
            )
            await self._forget(connection, intent.sandbox_id)
            await sandboxes.apply(connection, intent.sandbox_id, change)
            told = {"name": intent.name, "sandbox_id": intent.sandbox_id, "actor": change.actor}
            await record_event(connection, intent.team_id, SNAPSHOT_CREATED, change.at, told)
        return template

    async def abandon(
        self, intent: SnapshotIntent, change: sandboxes.Change | None, now: datetime
    ) -> None:
        """Release the name, discard the image and apply `change` where it is legal, at once."""
        async with self._guard.write(intent.team_id) as connection:
            await self._forget(connection, intent.sandbox_id)
            await _end(connection, intent.sandbox_id, intent.image_id, change, now)

    async def _forget(self, connection: AsyncConnection, sandbox_id: SandboxId) -> None:
        await connection.execute(
            delete(snapshot_intents).where(snapshot_intents.c.sandbox_id == sandbox_id)
        )

    async def intents(self) -> list[SnapshotIntent]:
        return await self._database.records(SnapshotIntent, select(snapshot_intents))

    async def begin_fork(
        self, team_id: TeamId, image: ForkImage, change: sandboxes.Change
    ) -> Sandbox:
        """Announce the image of forks, in one transaction with their sandbox's `change`.

        Raises `Missing` or `IllegalTransition` for the sandbox, `QuotaExceeded` for the team.
        """
        async with self._guard.write(team_id, check_disk) as connection:
            await connection.execute(insert(fork_images).values(values(image)))
            return await sandboxes.apply(connection, image.sandbox_id, change)

    async def end_fork(self, image: ForkImage, change: sandboxes.Change) -> None:
        """Discard the image of forks and apply `change` where it is legal, at once."""
        team_id = await self._guard.team_of(image.sandbox_id)
        writing = self._database.write() if team_id is None else self._guard.write(team_id)
        async with writing as connection:
            mine = fork_images.c.image_id == image.image_id
            await connection.execute(delete(fork_images).where(mine))
            await _end(connection, image.sandbox_id, image.image_id, change, change.at)

    async def fork_images(self) -> list[ForkImage]:
        return await self._database.records(ForkImage, select(fork_images))

    async def discarded(self) -> list[ImageId]:
        """The images to remove from the host."""
        rows = await self._database.rows(select(discarded_images.c.image_id))
        return [ImageId(row.image_id) for row in rows]

    async def known_images(self) -> set[ImageId]:
        """Every image that a template, something under way or a note to remove it names."""
        query = union(
            select(templates.c.image_id),
            select(snapshot_intents.c.image_id),
            select(fork_images.c.image_id),
            select(discarded_images.c.image_id),
        )
        return {ImageId(row.image_id) for row in await self._database.rows(query)}

    async def forget_discarded(self, images: Sequence[ImageId]) -> None:
        forgotten = delete(discarded_images).where(discarded_images.c.image_id.in_(images))
        await self._database.change(forgotten)
