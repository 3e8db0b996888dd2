"""Which Firecracker is taken, and which is refused with what reason."""

from pathlib import Path

import msgspec
import pytest

from wrenn_sandbox.errors import HostFailure, IncompatibleImage
from wrenn_sandbox.host.engines import EngineStore, noted
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.vmm.firecracker import binary
from wrenn_sandbox.host.vmm.firecracker.binary import found, installed, require_usable


def _saying(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that says it is Firecracker 1.14.4, and is taken for one that is static."""
    monkeypatch.setattr(binary, "_is_static", lambda _: True)
    return _saying(tmp_path / "firecracker", "Firecracker v1.14.4")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path / "data")
    paths.prepare()
    return paths


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("Firecracker v1.13.0", "1.13.0"),
        ("Firecracker v1.14.4\nmore", "1.14.4"),
        ("Firecracker v1.15.0-dev", "1.15.0"),
        ("Firecracker v2.0.1", "2.0.1"),
    ],
)
def test_new_versions_are_taken(program: Path, said: str, version: str) -> None:
    assert require_usable(_saying(program, said)) == version


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Firecracker v1.12.1", "Firecracker 1.12.1 is too old; 1.13 or later is needed"),
        ("Firecracker v0.25.0", "too old"),
        ("QEMU emulator version 7.2.0", "did not report its version"),
        ("", "did not report its version"),
    ],
)
def test_others_are_refused(program: Path, said: str, reason: str) -> None:
    with pytest.raises(HostFailure, match=reason):
        require_usable(_saying(program, said))


@pytest.mark.usefixtures("program")
def test_a_program_that_fails_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostFailure, match="does not run here"):
        require_usable(Path("/bin/false"))
    with pytest.raises(HostFailure, match="does not run here"):
        require_usable(tmp_path / "missing")


def test_a_program_with_libraries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostFailure, match="needs libraries of the host"):
        require_usable(_saying(tmp_path / "script", "Firecracker v1.14.4"))
    assert not binary._is_static(Path("/bin/ls"))


def test_the_named_binary_comes_before_the_one_on_the_path(tmp_path: Path, program: Path) -> None:
    assert found(program) == program
    assert found(tmp_path / "missing") is None


def test_a_relative_path_names_a_firecracker_wherever_it_is_started(
    tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert found(Path(program.name)) == program


def test_the_binary_is_kept_as_an_engine(paths: Paths, program: Path) -> None:
    engines = EngineStore(paths)
    kept = installed(engines, paths.installed_engine, program)
    assert kept.version == "1.14.4"
    assert kept.program.read_bytes() == program.read_bytes()
    assert noted(paths.installed_engine) == kept.digest
    assert installed(engines, paths.installed_engine, program) == kept
    assert engines.open(kept.digest).title == "Firecracker 1.14.4"
    newer = installed(engines, paths.installed_engine, _saying(program, "Firecracker v1.15.1"))
    assert newer.digest != kept.digest
    assert engines.sound(kept.digest).vmm_version == "1.14.4"


def test_a_retired_binary_starts_no_machine(paths: Paths, program: Path) -> None:
    engines = EngineStore(paths)
    kept = installed(engines, paths.installed_engine, program)
    engines.retire(kept.digest)
    with pytest.raises(HostFailure, match="was retired on this host"):
        installed(engines, paths.installed_engine, program)
    with pytest.raises(IncompatibleImage):
        engines.sound(kept.digest)


def test_a_missing_binary_is_told(paths: Paths, tmp_path: Path) -> None:
    with pytest.raises(HostFailure, match="WRENN_FIRECRACKER names its binary"):
        installed(EngineStore(paths), paths.installed_engine, tmp_path / "missing")


def test_the_note_is_no_qemus(paths: Paths, program: Path) -> None:
    """QEMU's driver looks for its own files anew then."""
    installed(EngineStore(paths), paths.installed_engine, program)
    assert msgspec.json.decode(paths.installed_engine.read_bytes()).keys() == {"engine", "binary"}
