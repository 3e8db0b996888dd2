"""What sandboxes use and have used, as E2B's clients and its dashboard ask for it."""

from datetime import UTC, datetime
from typing import Annotated, Self

from fastapi import APIRouter, Query

from wrenn_sandbox.control.api.authentication import CallerTeam
from wrenn_sandbox.control.api.responses import failures
from wrenn_sandbox.control.api.sandbox_metrics import Second
from wrenn_sandbox.control.api.services import Services, ServicesDependency
from wrenn_sandbox.errors import InvalidRequest, NotFound
from wrenn_sandbox.ids import TeamId
from wrenn_sandbox.wire.messages import Sample

from .fields import KNOWN_QUERY, PAGE_MAX, E2BResponse

router = APIRouter(prefix="/sandboxes", tags=["e2b"])


class Metric(E2BResponse):
    """What a sandbox used around one moment; sizes in bytes."""

    timestamp: datetime
    timestamp_unix: int
    cpu_count: int
    cpu_used_pct: float
    mem_used: int
    mem_total: int
    mem_cache: int
    disk_used: int
    disk_total: int

    @classmethod
    def of(cls, source: object) -> Self:
        assert isinstance(source, Sample)
        at = datetime.fromtimestamp(source.time, UTC)
        numbers = {
            name: getattr(source, name)
            for name in cls.model_fields
            if not name.startswith("timestamp")
        }
        return cls(timestamp=at, timestamp_unix=source.time, **numbers)


class Metrics(E2BResponse):
    """The last metric of each sandbox, by its id."""

    sandboxes: dict[str, Metric]


@router.get(
    "/metrics",
    operation_id="e2bGetMetricsOfSandboxes",
    dependencies=[KNOWN_QUERY],
    responses=failures(400, 401, 429),
)
async def get_metrics_of_all(
    team_id: CallerTeam, services: ServicesDependency, sandbox_ids: Annotated[str, Query()]
) -> Metrics:
    """What each of these sandboxes used last; ids with a comma in between."""
    ids = list(dict.fromkeys(sandbox_ids.split(",")))
    if len(ids) > PAGE_MAX:
        raise InvalidRequest(f"sandbox_ids: no more than {PAGE_MAX} can be asked for")
    found = {}
    for id in ids:
        try:
            known = await _samples(services, team_id, id, None, None)
        except NotFound:
            continue
        if known:
            found[id] = Metric.of(known[-1])
    return Metrics(sandboxes=found)


@router.get(
    "/{id}/metrics",
    operation_id="e2bGetMetrics",
    dependencies=[KNOWN_QUERY],
    responses=failures(400, 401, 404, 429),
)
async def get_metrics(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    start: Second = None,
    end: Second = None,
) -> list[Metric]:
    """What a sandbox used, by default in the last hour; not while its guest did not answer."""
    return [Metric.of(each) for each in await _samples(services, team_id, id, start, end)]


async def _samples(
    services: Services, team_id: TeamId, id: str, start: int | None, end: int | None
) -> list[Sample]:
    """The samples in which all is known that clients need."""
    found = await services.history.samples(team_id, id, start, end)
    return [
        each
        for each in found.samples
        if None
        not in (each.mem_used, each.mem_total, each.mem_cache, each.disk_used, each.disk_total)
    ]
