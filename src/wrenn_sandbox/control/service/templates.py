"""Templates by name: the host's base templates and a team's own snapshots."""

from wrenn_sandbox.control.store import Store
from wrenn_sandbox.control.store.records import TeamTemplate
from wrenn_sandbox.errors import NotFound
from wrenn_sandbox.ids import TeamId
from wrenn_sandbox.model.template import TemplateType, is_template_name
from wrenn_sandbox.wire.host import Host
from wrenn_sandbox.wire.messages import BaseTemplate, TemplateImage

Listed = BaseTemplate | TeamTemplate


class Templates:
    def __init__(self, store: Store, host: Host) -> None:
        self._store = store
        self._host = host

    async def find(self, team_id: TeamId, name: str) -> TeamTemplate | TemplateImage:
        """A template, the team's own before the host's; raises `NotFound`."""
        own = await self._own(team_id, name)
        if own is not None:
            return own
        base = await self._base(name) if is_template_name(name) else None
        if base is not None:
            return base
        raise NotFound("There is no such template; the list of templates has their names")

    async def named(self, team_id: TeamId, name: str) -> Listed:
        """A template, the team's own before the host's; raises `NotFound`."""
        own = await self._own(team_id, name)
        if own is not None:
            return own
        for each in await self._host.templates():
            if each.name == name:
                return each
        raise NotFound("There is no such template; the list of templates has their names")

    async def snapshot(self, team_id: TeamId, name: str) -> TeamTemplate:
        """A template of the team's own; raises `NotFound`."""
        own = await self._own(team_id, name)
        if own is None:
            raise NotFound("This team has no such snapshot; the list of templates has their names")
        return own

    async def _own(self, team_id: TeamId, name: str) -> TeamTemplate | None:
        if not is_template_name(name):
            return None
        return await self._store.team(team_id).templates.get(name)

    async def is_base(self, name: str) -> bool:
        """Whether a base template has that name."""
        return await self._base(name) is not None

    async def _base(self, name: str) -> TemplateImage | None:
        try:
            return await self._host.template_image(name)
        except NotFound:
            return None

    async def page(self, team_id: TeamId, kind: TemplateType | None) -> list[Listed]:
        """The templates of a team, newest first."""
        own = await self._store.team(team_id).templates.all()
        found: list[Listed] = [*own, *await self._host.templates()]
        return sorted(
            (each for each in found if kind is None or each.type is kind),
            key=lambda each: (each.created_at, each.name),
            reverse=True,
        )
