"""Disk layers as QEMU's own tools see them."""

import json
import subprocess
from pathlib import Path


def qemu_io(path: Path, *commands: str) -> None:
    """Run qemu-io commands on a layer; a pattern that is not there fails."""
    argv = ["qemu-io", "-f", "qcow2"]
    for command in commands:
        argv += ["-c", command]
    done = subprocess.run([*argv, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout, done.stdout


def info(path: Path) -> dict[str, object]:
    output = subprocess.check_output(["qemu-img", "info", "-U", "--output=json", str(path)])
    found = json.loads(output)
    assert isinstance(found, dict)
    return found


def is_clean(path: Path) -> bool:
    """Whether `qemu-img check` finds neither errors nor leaks."""
    argv = ["qemu-img", "check", "-q", str(path)]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0
