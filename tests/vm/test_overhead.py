"""The way through the API costs little more than the call to the guest agent itself."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vm

_ROOT = Path(__file__).parents[2]


def test_exec_of_true_costs_at_most_five_milliseconds_more(images: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "bench", "exec", "--results", str(tmp_path)]
    done = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [kept] = tmp_path.glob("*.json")
    agent, api = (each["samples"] for each in json.loads(kept.read_text())["series"])
    assert len(api) == len(agent) == 50
    assert statistics.median(api) - statistics.median(agent) <= 5
