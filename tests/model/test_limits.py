"""Bounds and names."""

import pytest

from wrenn_sandbox.model.limits import Bounds, OutOfBounds
from wrenn_sandbox.model.template import is_template_name

_BOUNDS = Bounds(max_vcpus=8, min_memory_mb=128, max_memory_mb=8192, max_timeout_sec=86_400)


@pytest.mark.parametrize(
    ("vcpus", "memory_mb", "timeout_sec"), [(1, 128, 0), (8, 8192, 86_400), (2, 512, 60)]
)
def test_sizes_within_bounds_are_accepted(vcpus: int, memory_mb: int, timeout_sec: int) -> None:
    _BOUNDS.check(vcpus=vcpus, memory_mb=memory_mb, timeout_sec=timeout_sec)


@pytest.mark.parametrize(
    ("vcpus", "memory_mb", "timeout_sec", "named"),
    [
        (0, 512, 0, "vcpus must be between 1 and 8"),
        (9, 512, 0, "vcpus must be between 1 and 8"),
        (1, 127, 0, "memory_mb must be between 128 and 8192"),
        (1, 8193, 0, "memory_mb must be between 128 and 8192"),
        (1, 512, -1, "timeout_sec must be between 0 and 86400"),
        (1, 512, 86_401, "timeout_sec must be between 0 and 86400"),
    ],
)
def test_sizes_out_of_bounds_are_refused(
    vcpus: int, memory_mb: int, timeout_sec: int, named: str
) -> None:
    with pytest.raises(OutOfBounds, match=named):
        _BOUNDS.check(vcpus=vcpus, memory_mb=memory_mb, timeout_sec=timeout_sec)


@pytest.mark.parametrize("name", ["a", "0", "minimal", "A.b_c-1", "x" * 64])
def test_names_that_may_name_a_template_are_accepted(name: str) -> None:
    assert is_template_name(name)


@pytest.mark.parametrize("name", ["", "-a", ".a", "_a", "a b", "a/b", "a\n", "\0", "é", "x" * 65])
def test_names_that_cannot_name_a_template_are_refused(name: str) -> None:
    assert not is_template_name(name)
