"""`GET /v1/sandboxes/{id}/metrics`: what a sandbox uses now, and what it has used."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query

from wrenn_sandbox.wire.messages import Sample

from .authentication import CallerTeam
from .fields import ResponseModel
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes/{id}", tags=["sandboxes"])

_LAST_SECOND = 253_402_300_799
"""Of the year 9999."""

Second = Annotated[int | None, Query(ge=0, le=_LAST_SECOND, description="Unix seconds")]


class SandboxMetrics(ResponseModel):
    """Use of resources inside a sandbox now; sizes in bytes.

    `mem_limit` and `process_limit` are what all commands together may use. `egress_denied` is how
    often a name was refused that the network policy does not allow, since it has names or the
    sandbox was last started; null without names. `egress_denied_names` are the last ones.
    """

    cpu_count: int
    cpu_used_pct: float
    mem_total: int
    mem_used: int
    mem_cache: int
    disk_used: int
    disk_total: int
    mem_limit: int | None
    process_count: int | None
    process_limit: int | None
    egress_denied: int | None
    egress_denied_names: list[str]


class MetricsSample(ResponseModel):
    """What a sandbox used around one moment; sizes in bytes.

    `cpu_used_pct` is of all its CPUs, measured from outside. Memory and disk are null where the
    guest did not answer. The network counts since the sandbox was created, null where the host does
    not see it.
    """

    time: datetime
    cpu_count: int
    cpu_used_pct: float
    mem_total: int | None
    mem_used: int | None
    mem_cache: int | None
    disk_total: int | None
    disk_used: int | None
    net_received: int | None
    net_sent: int | None

    @classmethod
    def told(cls, sample: Sample) -> "MetricsSample":
        numbers = {name: getattr(sample, name) for name in cls.model_fields if name != "time"}
        return cls(time=datetime.fromtimestamp(sample.time, UTC), **numbers)


class MetricsHistory(ResponseModel):
    """Samples, oldest first, at most one for each `step_sec`; none while it did not run."""

    step_sec: int
    samples: list[MetricsSample]


@router.get(
    "/metrics",
    operation_id="getSandboxMetrics",
    responses=failures(400, 401, 404, 409, 429, 502),
)
async def get_metrics(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    start: Second = None,
    end: Second = None,
) -> SandboxMetrics | MetricsHistory:
    """What the sandbox uses of its CPUs, memory and disk now; no activity.

    With `start` or `end` instead what it used in that time, in whatever state it is: a sample each
    5 seconds where `start` is within the last hour, else each minute of the last day.
    """
    if start is None and end is None:
        return SandboxMetrics.of(await services.guests.metrics(team_id, id))
    found = await services.history.samples(team_id, id, start, end)
    samples = [MetricsSample.told(each) for each in found.samples]
    return MetricsHistory(step_sec=found.step_sec, samples=samples)
