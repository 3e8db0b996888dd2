"""The way through the API costs little more than the call to the guest agent itself."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vm

_BENCH = Path(__file__).parents[2] / "bench" / "exec_overhead.py"


def test_exec_of_true_costs_at_most_five_milliseconds_more(images: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, _BENCH, "--results", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [kept] = tmp_path.glob("*.json")
    samples = json.loads(kept.read_text())["samples"]
    assert len(samples["api"]) == len(samples["agent"]) == 50
    assert statistics.median(samples["api"]) - statistics.median(samples["agent"]) <= 5
