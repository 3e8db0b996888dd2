"""The verdict on KVM: by an injected guest, and by the real one."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from wrenn_sandbox.host import facts as found
from wrenn_sandbox.host import probe
from wrenn_sandbox.host.facts import machine_facts
from wrenn_sandbox.host.probe import GuestRun, KvmVerdict, RunGuest, kvm_verdict, probe_kvm


class Guest:
    """A guest that reports what the test says, and counts its runs."""

    def __init__(self, result: GuestRun | Exception) -> None:
        self.result = result
        self.runs = 0

    async def __call__(self) -> GuestRun:
        self.runs += 1
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "kvm"
    path.touch()
    return path


FAST = GuestRun(instructions=100_002, real_seconds=0.000_060, user_seconds=0.000_060)
SLOW = GuestRun(instructions=100_002, real_seconds=0.055, user_seconds=0.055)


def seconds(real: float, user: float) -> GuestRun:
    return GuestRun(instructions=100_002, real_seconds=real, user_seconds=user)


@pytest.mark.parametrize(
    ("result", "usable", "reason"),
    [
        (FAST, True, "1,666.7 instructions per microsecond in real mode"),
        (FAST, True, "1,666.7 as a 64-bit program"),
        (seconds(0.0, 0.0), True, "instructions per microsecond"),
        (seconds(0.001_9, 0.001_9), True, "52.6"),
        (seconds(0.002_1, 0.002_1), True, "47.6"),
        (seconds(0.010_6, 0.000_1), False, "9.4"),
        (seconds(0.000_1, 0.010_6), False, "9.4 as a 64-bit program, too slow"),
        (SLOW, False, "1.8 as a 64-bit program, too slow"),
        (GuestRun(error="[Errno 13] Permission denied"), False, "Permission denied"),
        (TimeoutError(), False, "did not end within 2 s"),
    ],
)
async def test_the_verdict_follows_what_the_tiny_guest_did(
    device: Path, result: GuestRun | Exception, usable: bool, reason: str
) -> None:
    verdict = await probe_kvm(Guest(result), device)
    assert verdict.usable is usable
    assert reason in verdict.reason


async def test_without_the_device_no_guest_is_tried(tmp_path: Path) -> None:
    guest = Guest(FAST)
    verdict = await probe_kvm(guest, tmp_path / "kvm")
    assert not verdict.usable
    assert "there is no" in verdict.reason
    assert guest.runs == 0


async def test_the_verdict_is_kept(tmp_path: Path, device: Path) -> None:
    cache, guest = tmp_path / "cache" / "kvm.json", Guest(FAST)
    first = await kvm_verdict(cache, guest, device)
    assert await kvm_verdict(cache, guest, device) == first
    assert guest.runs == 1
    assert [path.name for path in cache.parent.iterdir()] == ["kvm.json"]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"machine": 1}', b"\xff\x00"])
async def test_a_damaged_cache_is_probed_anew(tmp_path: Path, device: Path, damage: bytes) -> None:
    cache, guest = tmp_path / "kvm.json", Guest(SLOW)
    cache.write_bytes(damage)
    assert not (await kvm_verdict(cache, guest, device)).usable
    assert guest.runs == 1
    assert msgspec.json.decode(cache.read_bytes())["verdict"]["usable"] is False


async def test_another_boot_is_probed_anew(
    tmp_path: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, guest = tmp_path / "kvm.json", Guest(FAST)
    await kvm_verdict(cache, guest, device)
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another\n")
    monkeypatch.setattr(probe, "BOOT_ID", boot_id)
    await kvm_verdict(cache, guest, device)
    assert guest.runs == 2


async def test_a_guest_that_hangs_is_ended(
    tmp_path: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, pid_file = tmp_path / "hangs.py", tmp_path / "pid"
    program.write_text(
        "import os, pathlib, signal\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "while True: signal.pause()\n"
    )
    monkeypatch.setattr(probe, "GUEST_PROGRAM", program)
    monkeypatch.setattr(probe, "DEADLINE_SEC", 0.5)
    assert not (await probe_kvm(device=device)).usable
    assert not Path("/proc", pid_file.read_text()).exists()  # noqa: ASYNC240


async def test_a_slow_start_of_the_program_is_not_held_against_kvm(
    tmp_path: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "slow.py"
    program.write_text(
        "import time; time.sleep(1); print('ready', flush=True)\n"
        """print('{"instructions": 100000, "real_seconds": 0.0001, "user_seconds": 0.0001}')\n"""
    )
    monkeypatch.setattr(probe, "GUEST_PROGRAM", program)
    monkeypatch.setattr(probe, "DEADLINE_SEC", 0.5)
    assert (await probe_kvm(device=device)).usable


async def test_a_guest_program_that_fails_is_no_usable_kvm(
    tmp_path: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "fails.py"
    program.write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(probe, "GUEST_PROGRAM", program)
    assert "status 3" in (await probe_kvm(device=device)).reason


async def test_the_real_guest_gives_a_verdict_in_time() -> None:
    """Whatever this machine's KVM is like; the reason says why."""
    run: RunGuest = probe.run_guest
    async with asyncio.timeout(10):
        verdict = await probe_kvm(run)
    assert isinstance(verdict, KvmVerdict)
    assert verdict.usable == ("too" not in verdict.reason and "not" not in verdict.reason)


def test_the_facts_of_this_machine(tmp_path: Path) -> None:
    facts = machine_facts(tmp_path / "not" / "there")
    assert facts.memory_mb >= facts.memory_available_mb > 0
    assert facts.disk_free_mb > 0
    assert facts.kernel.count(".") >= 2
    assert facts.qemu_path is not None
    assert facts.qemu_version.split(".")[0].isdigit()
    assert all(path is None or path.is_absolute() for path in facts.tools.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("hook", "policy", "dropped"),
    [("forward", "drop", True), ("forward", "accept", False), ("input", "drop", False)],
)
def test_a_firewall_that_drops_forwarded_packets_is_found(
    monkeypatch: pytest.MonkeyPatch, hook: str, policy: str, dropped: bool
) -> None:
    listed = f"\t\ttype filter hook {hook} priority filter; policy {policy};"
    chains = f"table ip f {{\n\tchain C {{\n{listed}\n\t}}\n\tchain DROP {{\n\t}}\n}}\n"
    monkeypatch.setattr(found, "_output", lambda argv: chains)
    assert found._forward_dropped() is dropped
