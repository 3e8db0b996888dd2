"""Templates by name: the host's base templates and a team's own snapshots."""

from dataclasses import dataclass
from datetime import datetime

from wrenn_sandbox.control.store import Store
from wrenn_sandbox.errors import NotFound
from wrenn_sandbox.ids import ImageId, TeamId
from wrenn_sandbox.model.template import TemplateType, is_template_name
from wrenn_sandbox.wire.host import Host


@dataclass(frozen=True, slots=True)
class Template:
    """What a sandbox can start from; memory in MiB, `size_bytes` allocated on disk."""

    name: str
    type: TemplateType
    image_id: ImageId
    vcpus: int
    memory_mb: int
    size_bytes: int
    created_at: datetime


class Templates:
    def __init__(self, store: Store, host: Host) -> None:
        self._store = store
        self._host = host

    async def find(self, team_id: TeamId, name: str) -> Template:
        """The team's own template of this name, else the base template; raises `NotFound`."""
        if is_template_name(name):
            for template in (*await self._own(team_id), *await self.base()):
                if template.name == name:
                    return template
        raise NotFound("There is no such template; the list of templates has their names")

    async def page(self, team_id: TeamId, kind: TemplateType | None) -> list[Template]:
        """The templates of a team, newest first."""
        found = [*await self._own(team_id), *await self.base()]
        return sorted(
            (each for each in found if kind is None or each.type is kind),
            key=lambda each: (each.created_at, each.name),
            reverse=True,
        )

    async def base(self) -> list[Template]:
        return [
            Template(
                name=each.name,
                type=TemplateType.BASE,
                image_id=each.image_id,
                vcpus=each.vcpus,
                memory_mb=each.memory_mb,
                size_bytes=each.size,
                created_at=each.created_at,
            )
            for each in await self._host.templates()
        ]

    async def _own(self, team_id: TeamId) -> list[Template]:
        return [
            Template(
                name=each.name,
                type=TemplateType.SNAPSHOT,
                image_id=each.image_id,
                vcpus=each.vcpus,
                memory_mb=each.memory_mb,
                size_bytes=each.size_bytes,
                created_at=each.created_at,
            )
            for each in await self._store.team(team_id).templates.all()
        ]
