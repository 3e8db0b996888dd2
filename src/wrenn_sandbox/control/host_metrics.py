"""The numbers of a host, as it last gave them, in the form of Prometheus."""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Final

import msgspec
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from wrenn_sandbox.wire.messages import HostInfo
from wrenn_sandbox.wire.metrics import BUCKETS, HostMetrics, Shortage, StageTimes

_BOUNDS: Final = (*map(floatToGoString, BUCKETS), "+Inf")


class HostCollector(Collector):
    """`found` is what the host has said; None where it does not answer."""

    def __init__(self) -> None:
        self.found: tuple[HostInfo, HostMetrics] | None = None

    def collect(self) -> Iterator[Metric]:
        up = self.found is not None
        yield GaugeMetricFamily("wrenn_host_up", "1 where the host has just answered", int(up))
        if self.found is None:
            return
        info, host = self.found
        build = GaugeMetricFamily(
            "wrenn_host_info",
            "1, with what the host runs VMs with",
            labels=("driver", "accelerator", "network", "vmm_version"),
        )
        build.add_metric((info.driver, info.accelerator, info.network, info.vmm_version), 1)
        yield build
        yield from _room(host)
        yield from _pool(host)
        yield _by(
            GaugeMetricFamily("wrenn_stored_bytes", "Allocated on the disk", labels=("kind",)),
            {} if host.stored is None else msgspec.structs.asdict(host.stored),
        )
        yield _stages(host.stages)


def _room(host: HostMetrics) -> Iterator[Metric]:
    yield _by(GaugeMetricFamily("wrenn_host_vms", "VMs by state", labels=("state",)), host.vms)
    slots = {"used": host.slots.used, "ready": host.slots.ready}
    if host.slots.capacity is not None:
        slots["free"] = host.slots.capacity - host.slots.used - host.slots.ready
    yield _by(
        GaugeMetricFamily("wrenn_host_slots", "Network slots by state", labels=("state",)), slots
    )
    for name, text, value in (
        ("vms_limit", "How many sandboxes may run", host.vms_limit),
        ("memory_total_bytes", "Memory of the host", host.memory_total),
        ("memory_free_bytes", "Memory that new processes can have", host.memory_free),
        ("memory_reserve_bytes", "Memory that is to stay free", host.memory_reserve),
        ("memory_promised_bytes", "Memory promised to sandboxes", host.memory_promised),
        ("memory_limit_bytes", "Memory that may be promised, if bounded", host.memory_limit),
        ("disk_total_bytes", "Disk space of the data directory", host.disk_total),
        ("disk_free_bytes", "Disk space that is free", host.disk_free),
        ("disk_reserve_bytes", "Disk space that is to stay free", host.disk_reserve),
    ):
        yield GaugeMetricFamily(f"wrenn_host_{name}", text, value)
    refusals = CounterMetricFamily(
        "wrenn_host_refusals", "Requests for which the host had no room", labels=("reason",)
    )
    yield _by(refusals, {each.value: host.refusals.get(each, 0) for each in Shortage})


def _pool(host: HostMetrics) -> Iterator[Metric]:
    pool = host.pool
    yield GaugeMetricFamily("wrenn_pool_wanted", "VMs that the pool is to hold", pool.wanted)
    yield GaugeMetricFamily("wrenn_pool_ready", "VMs that the pool holds", pool.ready)
    yield CounterMetricFamily("wrenn_pool_hits", "Creates that got a VM of the pool", pool.hits)
    yield CounterMetricFamily("wrenn_pool_misses", "Creates that found the pool empty", pool.misses)


def _stages(stages: tuple[StageTimes, ...]) -> Metric:
    family = HistogramMetricFamily(
        "wrenn_stage_seconds",
        "Time of the stages of operations on the host",
        labels=("operation", "stage"),
    )
    for each in stages:
        counts = list(zip(_BOUNDS, accumulate(each.counts), strict=True))
        family.add_metric((each.operation, each.stage), counts, each.seconds)
    return family


def _by(
    family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]
) -> GaugeMetricFamily | CounterMetricFamily:
    for label, value in values.items():
        family.add_metric((label,), value)
    return family
