"""The installed QEMU as it is kept: complete, and started from where it is kept alone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.other_qemu import other_qemu, path_with
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.engines import Engine, EngineStore, noted
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.vmm.qemu.binary import has_seccomp, version_of
from wrenn_sandbox.host.vmm.qemu.command import BINARY, MACHINE, Program
from wrenn_sandbox.host.vmm.qemu.engine import _loaded, constituents, installed, program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(BINARY) is None, reason="needs QEMU"),
]
_MACHINE = ("-M", MACHINE, "-accel", "tcg", "-m", "16", "-S", "-nodefaults", "-display", "none")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    paths = Paths(tmp_path_factory.mktemp("data"))
    paths.prepare()
    return paths


@pytest.fixture(scope="module")
def engine(paths: Paths) -> Engine:
    return installed(EngineStore(paths), paths.installed_engine)


def test_a_kept_qemu_is_the_installed_one(paths: Paths, engine: Engine) -> None:
    binary = shutil.which(BINARY)
    assert binary is not None
    kept = program(paths.engine(engine.digest), engine)
    assert version_of(kept) == version_of(Program((binary,)))
    assert has_seccomp(kept) == has_seccomp(Program((binary,)))
    assert noted(paths.installed_engine) == engine.digest


def test_a_kept_qemu_maps_nothing_but_its_own_files(paths: Paths, engine: Engine) -> None:
    """Libraries, and TCG where it is a module: the installed ones can be replaced at any time."""
    directory = paths.engine(engine.digest)
    kept = program(directory, engine)
    child = subprocess.Popen(
        [*kept.argv, *_MACHINE, "-name", "process=kept", "-qmp", "stdio"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(kept.environment),
    )
    with child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdin.write(b'{"execute": "qmp_capabilities"}')
        child.stdin.flush()
        greeting, answer = (json.loads(child.stdout.readline()) for _ in range(2))
        maps = Path(f"/proc/{child.pid}/maps").read_text("utf-8").splitlines()
        name = Path(f"/proc/{child.pid}/comm").read_text("ascii").strip()
        child.kill()
    assert "return" in answer
    assert greeting["QMP"]["version"]["qemu"]["major"] == int(engine.vmm_version.split(".")[0])
    assert name == "kept"
    mapped = {line.split(maxsplit=5)[5] for line in maps if "/" in line}
    programs = {each for each in mapped if ".so" in each or BINARY in each or "loader" in each}
    assert {str(directory / each) for each in (BINARY, "loader")} <= programs
    assert [each for each in sorted(programs) if not each.startswith(f"{directory}/")] == []


def test_what_a_qemu_loads_after_its_greeting_is_kept(tmp_path: Path) -> None:
    """It greets from a thread of its own, while another one may still load TCG."""
    module = tmp_path / "accel-played.so"
    module.write_bytes(bytes(4096))
    qemu = tmp_path / BINARY
    qemu.write_text(
        f"#!{os.path.realpath(sys.executable)} -IS\n"
        "import mmap, sys, time\n"
        "if '-L' in sys.argv: sys.exit()\n"
        "print('{\"QMP\": {}}', flush=True)\n"
        "time.sleep(0.3)\n"
        f"file = open({str(module)!r}, 'rb')\n"
        "mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "sys.stdin.readline()\n"
        "print('{\"return\": {}}', flush=True)\n"
        "time.sleep(60)\n"
    )
    qemu.chmod(0o755)
    executable, mapped = _loaded(str(qemu))
    assert executable == Path(sys.executable).resolve()
    assert module in mapped


def test_a_kept_qemu_has_the_firmware_that_its_machines_start_with(
    paths: Paths, engine: Engine, tmp_path: Path
) -> None:
    """And finds none where it is kept but for that: not even the host's."""
    kept = program(paths.engine(engine.digest), engine)
    elsewhere = [str(tmp_path) if each.endswith("/firmware") else each for each in kept.argv]
    assert _start(kept.argv, kept) == ""
    assert "BIOS" in _start(elsewhere, kept)
    assert _start([*kept.argv, "-bios", "qboot.rom"], kept) == ""


def _start(argv: Sequence[str], kept: Program) -> str:
    """What it complains of."""
    done = subprocess.run(
        [*argv, *_MACHINE, "-monitor", "stdio"],
        input=b"quit\n",
        capture_output=True,
        env=dict(kept.environment),
        check=False,
    )
    return done.stderr.decode()


def test_a_qemu_that_is_kept_is_not_kept_again(
    paths: Paths, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = EngineStore(paths)
    monkeypatch.setattr(engines, "keep", None)
    assert installed(engines, paths.installed_engine) == engine


def test_another_qemu_is_another_engine(
    paths: Paths, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = EngineStore(paths)
    programs = other_qemu(tmp_path)
    monkeypatch.setenv("PATH", path_with(programs))
    newer = installed(engines, paths.installed_engine)
    assert newer.digest != engine.digest
    assert newer.vmm_version == engine.vmm_version
    assert {name for name in newer.files if newer.files[name] != engine.files[name]} == {BINARY}
    assert noted(paths.installed_engine) == newer.digest
    with (programs / BINARY).open("r+b") as file:  # written over in its place
        file.seek(-1, os.SEEK_END)
        file.write(b"1")
    newest = installed(engines, paths.installed_engine)
    assert newest.digest not in (engine.digest, newer.digest)
    engines.retire(newest.digest)
    with pytest.raises(HostFailure, match="was retired on this host"):
        installed(engines, paths.installed_engine)


def test_a_damaged_engine_is_mended_from_the_installed_qemu(tmp_path: Path, engine: Engine) -> None:
    paths = Paths(tmp_path)
    paths.prepare()
    installed(EngineStore(paths), paths.installed_engine)
    damaged = paths.engine(engine.digest) / BINARY
    damaged.unlink()
    assert installed(EngineStore(paths), paths.installed_engine).digest == engine.digest
    assert damaged.exists()


def test_what_is_no_program_cannot_be_kept(tmp_path: Path) -> None:
    script = tmp_path / BINARY
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(HostFailure, match="cannot be kept"):
        constituents(str(script))
