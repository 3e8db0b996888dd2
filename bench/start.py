"""The ways to a running sandbox, turn by turn: a cold boot, QEMU alone restoring the snapshot, a
restored create on the host and through the API, a claim of a machine that was ready.
"""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from wrenn_sandbox.errors import AgentError
from wrenn_sandbox.host.guest import GuestClient
from wrenn_sandbox.host.launch_source import LaunchSource, source_of
from wrenn_sandbox.host.machine import Machine
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory

from .api import Api, served
from .bare import Bare
from .report import Check, Report
from .rig import Rig
from .timing import Stopwatch

COLD, BARE = "cold boot to the agent's answer", "bare QEMU: spawn to QMP, load the same state"
CREATE, API = "restored create, host", "restored create, public API"
CLAIM, API_CLAIM = "claim from the hot pool, host", "claim from the hot pool, public API"
_WARM_UP = 1
_ATTEMPT_SEC = 0.25
_HOT = 2


async def measure(settings: Settings, rounds: int, cold_rounds: int) -> Report:
    """All ways `rounds` times, the cold boot `cold_rounds` times."""
    watch = Stopwatch()
    async with AsyncExitStack() as stack:
        new = stack.enter_context
        plain = await stack.enter_async_context(
            Rig.open(_settings(settings, new(working_directory(settings.data_dir, "bench")), 0))
        )
        hot = await stack.enter_async_context(
            Rig.open(_settings(settings, new(working_directory(settings.data_dir, "bench")), _HOT))
        )
        api = await _server(stack, settings, 0)
        hot_api = await _server(stack, settings, _HOT)
        for turn in range(_WARM_UP + rounds):
            kept = watch if turn >= _WARM_UP else Stopwatch()
            if turn - _WARM_UP < cold_rounds:
                await _cold(plain, kept)
            await _bare(plain, kept)
            await _create(plain, kept, CREATE)
            await _create(hot, kept, CLAIM)
            await _api_create(api, kept, API)
            await asyncio.sleep(0.5)
            await _api_create(hot_api, kept, API_CLAIM)
        accelerator = plain.context.driver.capabilities.accelerator
    return _report(watch, accelerator)


def _settings(settings: Settings, data_dir: Path, hot: int) -> Settings:
    return settings.model_copy(update={"data_dir": data_dir, "hot_pool_size": hot})


async def _server(stack: AsyncExitStack, settings: Settings, hot: int) -> Api:
    url, _ = await asyncio.to_thread(stack.enter_context, served(settings, {}, hot=hot))
    api = await Api.open(url)
    stack.callback(api.close)
    return api


async def _cold(rig: Rig, watch: Stopwatch) -> None:
    store, cold = rig.context.store, rig.cold
    source = LaunchSource(
        image=cold,
        vcpus=cold.vcpus,
        memory_mb=cold.memory_mb,
        disk=store.below(cold),
    )
    await rig.settled()
    async with AsyncExitStack() as stack:
        with watch.lap(COLD):
            machine = await Machine.boot(rig.context, source, "memory")
            stack.push_async_callback(machine.release)
            await _until_healthy(rig, machine)


async def _until_healthy(rig: Rig, machine: Machine) -> None:
    client = GuestClient(lambda: rig.context.connect(machine.spec.slot), None)
    try:
        while True:
            try:
                async with asyncio.timeout(_ATTEMPT_SEC):
                    return await client.health()
            except (TimeoutError, AgentError):
                await asyncio.sleep(0.01)
    finally:
        client.close()


async def _bare(rig: Rig, watch: Stopwatch) -> None:
    await rig.settled()
    async with Bare.prepared(rig.context, source_of(rig.context, rig.warm)) as bare:
        with watch.lap(BARE):
            bare.start()
            bare.load()


async def _create(rig: Rig, watch: Stopwatch, name: str) -> None:
    await rig.settled()
    with watch.lap(name):
        sandbox = await rig.create()
    await rig.destroy(sandbox)
    await rig.settled()


async def _api_create(api: Api, watch: Stopwatch, name: str) -> None:
    with watch.lap(name):
        sandbox = await api.create()
    await api.delete(sandbox)
    await asyncio.sleep(1.0)


@dataclass(frozen=True)
class _Limits:
    cold: float
    """Of a cold boot's time over that of a restored create, at least; of the others, at most."""
    bare: float
    claim: float
    api_claim: float


LIMITS: Final = {
    "tcg": _Limits(cold=15, bare=5, claim=0.25, api_claim=0.25),
    "kvm": _Limits(cold=4, bare=3, claim=0.25, api_claim=0.35),
}
"""By accelerator: under KVM a guest boots in less than a second, and a create has little to do
besides what the host does for it. Then what the API adds to both stands out."""


def _report(watch: Stopwatch, accelerator: str) -> Report:
    limits = LIMITS[accelerator]
    report = Report(f"starting a sandbox ({accelerator})")
    found = {
        name: report.add(name, watch.samples[name]).median
        for name in (COLD, BARE, CREATE, API, CLAIM, API_CLAIM)
    }
    claim, api_claim = found[CLAIM] / found[CREATE], found[API_CLAIM] / found[API]
    report.checks = [
        Check("cold boot / restored create, host", found[COLD] / found[CREATE], limits.cold),
        Check("cold boot / restored create, API", found[COLD] / found[API], limits.cold),
        Check("restored create / bare QEMU", found[CREATE] / found[BARE], at_most=limits.bare),
        Check("hot claim / restored create, host", claim, at_most=limits.claim),
        Check("hot claim / restored create, API", api_claim, at_most=limits.api_claim),
    ]
    return report
