"""How much slower a guest's disk is with bounds than without: bytes and operations in a second."""

from wrenn_sandbox.settings import Settings

from .api import Api, served
from .report import Check, Report
from .timing import Stopwatch

MBPS, IOPS = 2, 50
WRITTEN_MB, OPERATIONS = 4, 100
FREE_BYTES, FREE_OPERATIONS = "4 MB written, unbounded", "100 operations, unbounded"
BOUND_BYTES, BOUND_OPERATIONS = "4 MB written at 2 MB/s", "100 operations at 50 a second"
_DD = ("dd", "if=/dev/zero", "of=/root/written", "oflag=direct")


async def measure(settings: Settings, rounds: int) -> Report:
    """`rounds` writes of both kinds, on a server without bounds and on one with them."""
    watch = Stopwatch()
    await _writes(settings, {}, rounds, watch, FREE_BYTES, FREE_OPERATIONS)
    bounds = {"WRENN_DISK_MBPS": str(MBPS), "WRENN_DISK_IOPS": str(IOPS)}
    await _writes(settings, bounds, rounds, watch, BOUND_BYTES, BOUND_OPERATIONS)
    report = Report("bounds of a guest's disk")
    found = {
        name: report.add(name, watch.samples[name]).median
        for name in (FREE_BYTES, BOUND_BYTES, FREE_OPERATIONS, BOUND_OPERATIONS)
    }
    by_bytes, by_operations = WRITTEN_MB * 1000 / MBPS, OPERATIONS * 1000 / IOPS
    report.checks = [
        Check("bounded / free, bytes", found[BOUND_BYTES] / found[FREE_BYTES], at_least=1.5),
        Check(
            "bounded / free, operations",
            found[BOUND_OPERATIONS] / found[FREE_OPERATIONS],
            at_least=1.5,
        ),
        Check(
            "time for bytes / by the bound",
            found[BOUND_BYTES] / by_bytes,
            at_least=0.6,
        ),
        Check(
            "time for operations / by the bound",
            found[BOUND_OPERATIONS] / by_operations,
            at_least=0.6,
        ),
    ]
    return report


async def _writes(
    settings: Settings,
    bounds: dict[str, str],
    rounds: int,
    watch: Stopwatch,
    of_bytes: str,
    of_operations: str,
) -> None:
    with served(settings, {"WRENN_BLANK_POOL_SIZE": "0", **bounds}) as (url, _):
        api = await Api.open(url)
        sandbox = await api.create()
        await api.exec(sandbox, *_DD, "bs=1M", f"count={WRITTEN_MB}")
        for _ in range(rounds):
            with watch.lap(of_bytes):
                await api.exec(sandbox, *_DD, "bs=1M", f"count={WRITTEN_MB}")
            with watch.lap(of_operations):
                await api.exec(sandbox, *_DD, "bs=4k", f"count={OPERATIONS}")
        await api.delete(sandbox)
        api.close()
