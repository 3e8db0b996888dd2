"""The numbers that the control plane counts."""

import asyncio

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from wrenn_sandbox.model.sandbox import Status

from .store import Store

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class Metrics:
    """The numbers of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Histogram(
            "wrenn_http_request_seconds",
            "Time to answer HTTP requests",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._sandboxes = Gauge(
            "wrenn_sandboxes", "Sandboxes by status", ("status",), registry=self.registry
        )
        self._corrections = Counter(
            "wrenn_corrections",
            "Corrections of the reconciler",
            ("event",),
            registry=self.registry,
        )
        self._auto_pauses = Counter(
            "wrenn_auto_pauses", "Automatic pauses", ("outcome",), registry=self.registry
        )

        self._not_responding = Gauge(
            "wrenn_sandboxes_not_responding",
            "Running sandboxes whose guests do not respond",
            registry=self.registry,
        )
        self._draining = Gauge(
            "wrenn_draining", "1 while the server is drained", registry=self.registry
        )

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        known = method if method in _METHODS else "other"
        self._requests.labels(known, route, str(status)).observe(seconds)

    def correction(self, event: str) -> None:
        self._corrections.labels(event).inc()

    def auto_pause(self, *, done: bool) -> None:
        self._auto_pauses.labels("paused" if done else "failed").inc()

    def not_responding(self, count: int) -> None:
        self._not_responding.set(count)

    def draining(self, now: bool) -> None:
        self._draining.set(now)

    async def text(self, store: Store) -> bytes:
        """All numbers as they are now."""
        counts = await store.all_sandboxes.count_by_status()
        for status in Status:
            self._sandboxes.labels(status.value).set(counts.get(status.value, 0))
        return await asyncio.to_thread(generate_latest, self.registry)
