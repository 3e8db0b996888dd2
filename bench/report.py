"""Samples, what they must satisfy, and how both are shown and kept."""

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Series:
    """What was measured again and again in one run; `unit` says of what; MB is MiB."""

    name: str
    unit: str
    samples: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p95(self) -> float:
        """The 95th percentile; the greatest where there are too few samples to tell."""
        if len(self.samples) < 2:
            return self.samples[0]
        return min(statistics.quantiles(self.samples, n=20)[-1], max(self.samples))


@dataclass(frozen=True)
class Check:
    """A figure and its limit, of one run: `at_least` or `at_most`."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def ok(self) -> bool:
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    @property
    def wanted(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:.2f}"
        return f"<= {self.at_most:.2f}"


@dataclass
class Report:
    """What one figure found."""

    title: str
    series: list[Series] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, samples: Sequence[float], unit: str = "ms") -> Series:
        """Keep the samples under a name."""
        series = Series(name, unit, tuple(samples))
        self.series.append(series)
        return series

    def text(self) -> str:
        """The table."""
        lines = [f"== {self.title}"]
        if self.series:
            lines.append(f"  {'':<52}{'median':>9}{'p95':>10}")
        for each in self.series:
            row = f"  {each.name:<52}{each.median:9.1f}{each.p95:10.1f} {each.unit}"
            lines.append(f"{row:<78} x{len(each.samples)}")
        for check in self.checks:
            verdict = "ok" if check.ok else "FAIL"
            lines.append(f"  {check.name:<52}{check.value:9.2f}   {check.wanted:<10} {verdict}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def save(directory: Path, name: str, report: Report, machine: str) -> Path:
    """Write the report with all its samples as JSON; returns the new file."""
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    target = directory / f"{name}-{now:%Y%m%dT%H%M%S%f}Z.json"
    content = {
        "name": name,
        "at": now.isoformat(),
        "machine": machine,
        "kernel": platform.release(),
        "series": [
            {
                "name": each.name,
                "unit": each.unit,
                "median": each.median,
                "p95": each.p95,
                "samples": each.samples,
            }
            for each in report.series
        ],
        "checks": [
            {"name": each.name, "value": each.value, "wanted": each.wanted, "ok": each.ok}
            for each in report.checks
        ],
        "notes": report.notes,
    }
    target.write_text(json.dumps(content, indent=1))
    return target
