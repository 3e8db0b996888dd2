"""The numbers of one server, as Prometheus reads them.

No label holds an id, a name or anything else that a caller chooses: its values are written in the
code, so that the number of series is bounded however much is made.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final, Literal

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from wrenn_sandbox import __version__
from wrenn_sandbox.errors import NoCapacity, WrennError
from wrenn_sandbox.model.sandbox import Status
from wrenn_sandbox.wire.codec import ERRORS
from wrenn_sandbox.wire.host import Host
from wrenn_sandbox.wire.metrics import BUCKETS

from .host_metrics import HostCollector
from .store import Store
from .store.database import UNUSABLE, DatabaseFault

Operation = Literal[
    "create", "resume", "pause", "snapshot", "checkpoint", "fork", "rollback", "exec"
]

_log = structlog.get_logger(__name__)
_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_CODES: Final = frozenset(each.code for each in ERRORS.values())
_READ_SEC: Final = 5.0
"""How long the database and the host may take to say what they have."""

GUEST_FAILURES: Final = ("exited", "stopped", "not_responding")


class Timing:
    """An operation under way. `path` is how a sandbox came to run, where the operation has one run.

    As a context manager it ends with the block, unless it has ended before.
    """

    def __init__(self, seconds: Histogram, operation: Operation) -> None:
        self.path = ""
        self._seconds = seconds
        self._operation = operation
        self._begin = time.perf_counter()
        self._ended = False

    def end(self, error: BaseException | None = None) -> float:
        """Count the operation, the first time; gives the seconds that it took."""
        took = time.perf_counter() - self._begin
        if not self._ended:
            self._ended = True
            self._seconds.labels(self._operation, self.path, _outcome(error)).observe(took)
        return took

    def __enter__(self) -> "Timing":
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        self.end(error)


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    if isinstance(error, WrennError):
        refused = error.status < 500 or isinstance(error, NoCapacity)
        return "refused" if refused else "failed"
    return "failed" if isinstance(error, Exception) else "cancelled"


class Metrics:
    """The numbers of one application, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        build = Gauge("wrenn_build_info", "1, with the version", ("version",), registry=registry)
        build.labels(__version__).set(1)
        self._requests = Histogram(
            "wrenn_http_request_seconds",
            "Time to answer HTTP requests, and how long WebSockets lasted",
            ("method", "route", "status"),
            registry=registry,
        )
        self._refusals = Counter(
            "wrenn_refusals",
            "Requests answered with an error, by code",
            ("code",),
            registry=registry,
        )
        self._operations = Histogram(
            "wrenn_operation_seconds",
            "Time of operations on sandboxes, from their begin to the durable outcome",
            ("operation", "path", "outcome"),
            buckets=BUCKETS,
            registry=registry,
        )
        self._exec_overhead = Histogram(
            "wrenn_exec_overhead_seconds",
            "What exec took beyond the time of the command itself",
            buckets=BUCKETS,
            registry=registry,
        )
        self._sandboxes = Gauge(
            "wrenn_sandboxes", "Sandboxes by status", ("status",), registry=registry
        )
        self._not_responding = Gauge(
            "wrenn_sandboxes_not_responding",
            "Running sandboxes whose guests do not respond",
            registry=registry,
        )
        self._guest_failures = Counter(
            "wrenn_guest_failures",
            "VMs that ended by themselves, and guests that stopped or fell silent",
            ("reason",),
            registry=registry,
        )
        self._corrections = Counter(
            "wrenn_corrections", "Corrections of the reconciler", ("event",), registry=registry
        )
        self._swept = Gauge(
            "wrenn_reconciler_last_sweep_timestamp_seconds",
            "When the reconciler last compared everything",
            registry=registry,
        )
        self._auto_pauses = Counter(
            "wrenn_auto_pauses", "Automatic pauses", ("outcome",), registry=registry
        )
        self._draining = Gauge("wrenn_draining", "1 while the server is drained", registry=registry)
        self._deliveries = Histogram(
            "wrenn_webhook_delivery_seconds",
            "Time of deliveries to webhooks",
            ("outcome",),
            buckets=BUCKETS,
            registry=registry,
        )
        self._webhooks = Gauge(
            "wrenn_webhooks", "Webhooks by how deliveries go", ("state",), registry=registry
        )
        self._backlog = Gauge(
            "wrenn_webhook_backlog_events",
            "Events that are not settled for a webhook yet",
            ("state",),
            registry=registry,
        )
        self._streams = Gauge(
            "wrenn_event_streams", "Callers that follow a stream of events", registry=registry
        )
        self._database_errors = Counter(
            "wrenn_database_errors", "Failed work on the database", ("kind",), registry=registry
        )
        self._database_up = Gauge(
            "wrenn_database_up", "1 where the database has just answered", registry=registry
        )
        self._host = HostCollector()
        registry.register(self._host)
        self.certificate = CertificateExpiry()
        registry.register(self.certificate)
        for code in _CODES:
            self._refusals.labels(code)
        for reason in GUEST_FAILURES:
            self._guest_failures.labels(reason)
        for kind in DatabaseFault:
            self._database_errors.labels(kind.value)

    def operation(self, name: Operation) -> Timing:
        """The timing of one that begins now."""
        return Timing(self._operations, name)

    def exec_overhead(self, seconds: float) -> None:
        self._exec_overhead.observe(seconds)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """`route` is the template of the path, `status` 0 where nothing was answered."""
        known = method if method in _METHODS else "WEBSOCKET" if method == "WEBSOCKET" else "other"
        kind = f"{status // 100}xx" if status else "none"
        self._requests.labels(known, route, kind).observe(seconds)

    def refusal(self, code: str) -> None:
        self._refusals.labels(code if code in _CODES else "other").inc()

    def guest_failure(self, reason: str) -> None:
        """One of `GUEST_FAILURES`."""
        assert reason in GUEST_FAILURES
        self._guest_failures.labels(reason).inc()

    def correction(self, event: str) -> None:
        self._corrections.labels(event).inc()

    def swept(self) -> None:
        self._swept.set_to_current_time()

    def auto_pause(self, *, done: bool) -> None:
        self._auto_pauses.labels("paused" if done else "failed").inc()

    def not_responding(self, count: int) -> None:
        self._not_responding.set(count)

    def draining(self, now: bool) -> None:
        self._draining.set(now)

    def delivery(self, outcome: str, seconds: float) -> None:
        self._deliveries.labels(outcome).observe(seconds)

    def event_streams(self, change: int) -> None:
        self._streams.inc(change)

    def database_error(self, kind: DatabaseFault) -> None:
        self._database_errors.labels(kind.value).inc()

    async def text(self, store: Store, host: Host) -> bytes:
        """All numbers as they are now.

        What a database or host has that does not answer is left out, and `wrenn_database_up` or
        `wrenn_host_up` is 0.
        """
        await asyncio.gather(self._read_store(store), self._read_host(host))
        return await asyncio.to_thread(generate_latest, self.registry)

    async def _read_store(self, store: Store) -> None:
        try:
            async with asyncio.timeout(_READ_SEC):
                counts = await store.all_sandboxes.count_by_status()
                webhooks = await store.webhooks.summary()
        except (TimeoutError, *UNUSABLE) as error:
            _log.warning("the database gives no numbers", detail=str(error))
            for gauge in (self._sandboxes, self._webhooks, self._backlog):
                gauge.clear()
            self._database_up.set(0)
            return
        self._database_up.set(1)
        for status in Status:
            self._sandboxes.labels(status.value).set(counts.get(status.value, 0))
        for state, found in webhooks.items():
            self._webhooks.labels(state).set(found.count)
            if state != "disabled":
                self._backlog.labels(state).set(found.backlog)

    async def _read_host(self, host: Host) -> None:
        try:
            async with asyncio.timeout(_READ_SEC):
                self._host.found = await host.info(), await host.metrics()
        except (TimeoutError, OSError, WrennError) as error:
            _log.warning("the host gives no numbers", detail=str(error))
            self._host.found = None


class CertificateExpiry(Collector):
    """When the certificate that is served is no longer valid, in seconds since the epoch."""

    def __init__(self) -> None:
        self.read: Callable[[], float | None] = lambda: None

    def collect(self) -> Iterator[Metric]:
        at = self.read()
        family = GaugeMetricFamily(
            "wrenn_tls_certificate_expiry_timestamp_seconds",
            "When the certificate of the server expires",
        )
        if at is not None:
            family.add_metric((), at)
        yield family
