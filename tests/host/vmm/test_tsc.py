"""The counter's rate is a plausible one, the same each time it is measured."""

import pytest

from wrenn_sandbox.host.vmm.qemu.tsc import agreed, host_tsc_khz


def test_two_measurements_agree() -> None:
    host_tsc_khz.cache_clear()
    first = host_tsc_khz()
    host_tsc_khz.cache_clear()
    second = host_tsc_khz()
    assert 500_000 < first < 10_000_000
    assert abs(first - second) < first / 1000


@pytest.mark.parametrize(
    ("measured", "rate"),
    [
        ([2596096, 2596098], 2596098),
        ([2310000, 2596096, 2596100], 2596100),
        ([2596096, 2310000, 2596090, 2596096], 2596096),
        ([2000000, 3000000, 2500000], 2500000),
    ],
)
def test_what_one_measurement_alone_says_does_not_count(measured: list[int], rate: int) -> None:
    assert agreed(iter(measured)) == rate
