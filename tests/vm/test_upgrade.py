"""QEMU is replaced by another version under machines that run."""

import os
from pathlib import Path

import pytest

from support.vm.rig import NewRig, error_of

pytestmark = pytest.mark.vm

_QEMU = "qemu-system-x86_64"


def test_what_a_machine_of_another_version_stores(new_rig: NewRig, tmp_path: Path) -> None:
    """It names the version that it needs, is refused by the new one and kept for the old one."""
    rig, api = new_rig()
    sandbox = api.create().id
    process = api.output(sandbox, "setsid sleep 4321 >/dev/null 2>&1 & echo $!")
    path = os.environ["PATH"]
    newer = tmp_path / _QEMU
    newer.write_text(
        f'#!/bin/sh\n[ "$1" != --version ] || exec echo QEMU emulator version 99.1.0\n'
        f'PATH={path} exec {_QEMU} "$@"\n'
    )
    newer.chmod(0o755)
    rig.server.kill()
    rig.server.set(PATH=f"{tmp_path}:{path}")
    rig.server.start()
    assert api.output(sandbox, f"tr '\\0' ' ' < /proc/{process}/cmdline") == "sleep 4321"
    api.pause(sandbox)
    answer = api.request("POST", f"/v1/sandboxes/{sandbox}/resume")
    assert (answer.status_code, error_of(answer).code) == (502, "agent_error")
    assert "version of the machine monitor" in error_of(answer).message
    assert "here 99.1.0" in error_of(answer).message
    assert api.get(sandbox).status == "paused"
    rig.server.stop()
    rig.server.set(PATH=path)
    rig.server.start()
    api.resume(sandbox)
    assert api.output(sandbox, f"tr '\\0' ' ' < /proc/{process}/cmdline") == "sleep 4321"
