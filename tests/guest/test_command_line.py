"""The agent's command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.agent_process import MAIN


@pytest.mark.parametrize(
    "arguments",
    [["--vm"], ["--port"], ["--port", "x"], ["--port", "70000"], ["--unknown", "1"], ["extra"]],
)
def test_refuses_what_it_does_not_understand(arguments: list[str]) -> None:
    """`--vm` included: outside of a VM the agent must never take over the machine."""
    argv = [sys.executable, "-I", "-S", str(MAIN), *arguments]
    done = subprocess.run(argv, capture_output=True, timeout=20)
    assert done.returncode == 1
    assert done.stderr
    assert done.stdout == b""
