"""The benchmarks: how they are called, limits that fit the accelerator, memory of a process."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench import start
from bench.memory import private_mb
from bench.timing import Stopwatch

from wrenn_sandbox.host.memory.pages import Mapping

_ROOT = Path(__file__).parents[2]
_MS_UNDER_KVM = {
    start.COLD: 700.0,
    start.BARE: 47.0,
    start.CREATE: 98.0,
    start.API: 110.0,
    start.CLAIM: 8.0,
    start.API_CLAIM: 31.0,
}


@pytest.mark.parametrize(("accelerator", "kept"), [("kvm", True), ("tcg", False)])
def test_the_limits_of_a_start_are_those_of_its_accelerator(accelerator: str, kept: bool) -> None:
    watch = Stopwatch()
    for name, milliseconds in _MS_UNDER_KVM.items():
        watch.samples[name].append(milliseconds)
    report = start._report(watch, accelerator)
    assert all(check.ok for check in report.checks) == kept


def test_the_help_of_the_benchmarks_builds_no_template(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    subprocess.run(
        [sys.executable, "-m", "bench", "--help"],
        cwd=_ROOT,
        env={**os.environ, "WRENN_DATA_DIR": str(data_dir)},
        capture_output=True,
        check=True,
    )
    assert not data_dir.exists()


def test_memory_of_a_vmm_alone_is_counted_without_that_of_its_guest() -> None:
    size = 64 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE) as guest:
        guest.write(bytes(size))
        low = ctypes.addressof(first := ctypes.c_char.from_buffer(guest))
        del first
        whole = private_mb(os.getpid())
        alone = private_mb(os.getpid(), [Mapping(os.getpid(), low, low + size)])
    assert whole - alone == pytest.approx(64, abs=16)
