"""The way through the API costs little more than the call to the guest agent itself."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vm

_ROOT = Path(__file__).parents[2]


_ATTEMPTS = 3
"""A limit in milliseconds is missed on a busy machine: the best of three counts."""


def test_exec_of_true_costs_at_most_five_milliseconds_more(images: Path, tmp_path: Path) -> None:
    """Or a fifth of the call itself, on machines where that takes longer than 25 ms."""
    costs = []
    for attempt in range(_ATTEMPTS):
        cost, call = _cost(tmp_path / str(attempt))
        if cost <= max(5, call / 5):
            return
        costs.append(cost)
    pytest.fail(f"each time more than 5 ms: {costs}")


def _cost(results: Path) -> tuple[float, float]:
    """What the API adds to the call to the guest agent, and that call alone; medians in ms."""
    argv = [sys.executable, "-m", "bench", "exec", "--results", str(results)]
    done = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    [kept] = results.glob("*.json")
    agent, api = (each["samples"] for each in json.loads(kept.read_text())["series"])
    assert len(api) == len(agent) == 50
    call = float(statistics.median(agent))
    return float(statistics.median(api)) - call, call
