"""What this machine can do, found out by trying."""

import asyncio
import os
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from wrenn_sandbox.patience import patience

from .paths import write_durably

KVM_DEVICE = Path("/dev/kvm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CPU_INFO = Path("/proc/cpuinfo")
GUEST_PROGRAM = Path(__file__).with_name("kvm_guest.py")
START_SEC = 30.0
"""For the program that runs the tiny guest to be ready: a slow host says nothing about its KVM."""
DEADLINE_SEC = 2.0
"""For the tiny guest itself."""
# Hardware runs thousands of these instructions a microsecond. A processor that is itself emulated
# runs 50 to 180, and then a guest under KVM is still faster than under TCG. Nested page tables in
# software run two.
MIN_INSTRUCTIONS_PER_USEC = 10.0
_PROBE = 3
"""Changes with what is measured, so that verdicts of before do not count."""


class KvmVerdict(msgspec.Struct, frozen=True):
    """Whether KVM runs ordinary guests here; `reason` is a sentence for the operator."""

    usable: bool
    reason: str
    cpu: str = ""
    """The CPU option with which the VMM starts; empty where that was not tried."""


class GuestRun(msgspec.Struct, frozen=True):
    """What the tiny guest reported: either `error` or the others.

    Seconds are those of all instructions, in real mode and as a 64-bit program in user mode.
    """

    instructions: int = 0
    real_seconds: float = 0.0
    user_seconds: float = 0.0
    error: str = ""

    @property
    def real_speed(self) -> float:
        """Instructions per microsecond in real mode, where every guest begins."""
        return self.instructions / max(self.real_seconds * 1e6, 1e-3)

    @property
    def user_speed(self) -> float:
        """Instructions per microsecond of a 64-bit program."""
        return self.instructions / max(self.user_seconds * 1e6, 1e-3)


class _Cached(msgspec.Struct, frozen=True):
    machine: str
    verdict: KvmVerdict


RunGuest = Callable[[], Awaitable[GuestRun]]
"""Runs the tiny guest. Raises `TimeoutError` when it does not end in time."""


def cpu_model(cpu_info: Path = CPU_INFO) -> str:
    """The model name of the first processor, or an empty string."""
    try:
        text = cpu_info.read_text("utf-8", "replace")
    except OSError:
        return ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


async def run_guest() -> GuestRun:
    """Run the tiny guest in a child process that is killed when it overruns a deadline."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(GUEST_PROGRAM),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert child.stdout is not None
        async with asyncio.timeout(patience(START_SEC)):
            await child.stdout.readline()
        async with asyncio.timeout(patience(DEADLINE_SEC)):
            output, _ = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    try:
        return msgspec.json.decode(output, type=GuestRun)
    except msgspec.DecodeError:
        return GuestRun(error=f"the probe ended with status {child.returncode}")


async def probe_kvm(run: RunGuest = run_guest, device: Path = KVM_DEVICE) -> KvmVerdict:
    """Judge KVM by running a tiny guest: that the device exists says nothing."""
    if not await asyncio.to_thread(device.exists):
        return KvmVerdict(False, f"there is no {device}")
    try:
        result = await run()
    except TimeoutError:
        return KvmVerdict(False, f"a tiny guest did not end within {patience(DEADLINE_SEC):g} s")
    if result.error:
        return KvmVerdict(False, f"a tiny guest did not run: {result.error}")
    measured = (
        f"a tiny guest ran {result.real_speed:,.1f} instructions per microsecond in real mode"
        f" and {result.user_speed:,.1f} as a 64-bit program"
    )
    if min(result.real_speed, result.user_speed) < MIN_INSTRUCTIONS_PER_USEC:
        return KvmVerdict(False, f"{measured}, too slow for an ordinary guest")
    return KvmVerdict(True, measured)


def _machine_key() -> str:
    try:
        boot_id = BOOT_ID.read_text("ascii").strip()
    except OSError:
        boot_id = ""
    device = KVM_DEVICE.exists()
    facts = (_PROBE, os.uname().release, boot_id, cpu_model(), os.geteuid(), device)
    return "|".join(map(str, facts))


def _load(path: Path, machine: str) -> KvmVerdict | None:
    try:
        cached = msgspec.json.decode(path.read_bytes(), type=_Cached)
    except (OSError, msgspec.DecodeError):
        return None
    return cached.verdict if cached.machine == machine else None


def _store(path: Path, cached: _Cached) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, msgspec.json.encode(cached))


async def kvm_verdict(
    cache_path: Path, run: RunGuest = run_guest, device: Path = KVM_DEVICE
) -> KvmVerdict:
    """The verdict on KVM, probed once per boot and kept in `cache_path`.

    A damaged cache, or one of another kernel, boot, processor or user, is probed anew.
    """
    machine = _machine_key()
    cached = await asyncio.to_thread(_load, cache_path, machine)
    if cached is not None:
        return cached
    verdict = await probe_kvm(run, device)
    await asyncio.to_thread(_store, cache_path, _Cached(machine, verdict))
    return verdict
