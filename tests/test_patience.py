"""Limits in time on slow machines."""

import time

import pytest

from wrenn_sandbox import patience as module
from wrenn_sandbox.patience import USUAL_SEC, patience, rated, slowness


@pytest.mark.parametrize(
    ("times", "factor"),
    [(0.3, 1), (1.0, 1), (1.99, 1), (2.01, 3), (11.2, 12), (29.5, 30), (1000.0, 30)],
)
def test_a_usual_machine_has_the_plain_limits_and_no_machine_endless_ones(
    times: float, factor: int
) -> None:
    assert rated(times * USUAL_SEC) == factor


def test_a_limit_is_longer_on_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "slowness", lambda: 12)
    assert patience(0.25) == 3.0


def test_the_best_of_several_trials_counts_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = iter((9.0, 4.5, 7.0))
    monkeypatch.setattr(module, "_measured", lambda: next(trials) * USUAL_SEC)
    slowness.cache_clear()
    try:
        assert slowness() == 5
        assert slowness() == 5
    finally:
        slowness.cache_clear()


def test_the_time_that_others_take_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is processor time, of which there is none while it waits."""
    monkeypatch.setattr(module, "_work", lambda: time.sleep(10 * USUAL_SEC))
    assert module._measured() < USUAL_SEC
