"""The counter's rate is a plausible one, the same each time it is measured."""

from wrenn_sandbox.host.vmm.qemu.tsc import host_tsc_khz


def test_two_measurements_agree() -> None:
    host_tsc_khz.cache_clear()
    first = host_tsc_khz()
    host_tsc_khz.cache_clear()
    second = host_tsc_khz()
    assert 500_000 < first < 10_000_000
    assert abs(first - second) < first / 1000
