"""The layout of a data directory: permissions, durable replacement, the guest's sources."""

from pathlib import Path

import pytest

from wrenn_sandbox.host.paths import Paths, guest_files, write_durably


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_permissions_do_not_depend_on_the_umask_or_the_past(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "a" / "data")
    paths.prepare()
    paths.data_dir.chmod(0o777)
    paths.prepare()
    passages = (paths.data_dir, paths.images, paths.run, paths.paused)
    assert {mode(p) for p in passages} == {0o711}
    private = (paths.templates, paths.held, paths.network, paths.cache, paths.locks)
    assert {mode(p) for p in private} == {0o700}


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, b"one")
    assert mode(path) == 0o600
    write_durably(path, b"two", mode=0o444)
    assert (path.read_bytes(), mode(path)) == (b"two", 0o444)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_replacement_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_durably(path, b"x")
    assert list(tmp_path.iterdir()) == [path]


def test_the_guest_sources_are_found() -> None:
    guest = guest_files()
    assert guest.init.read_text().startswith("#!/bin/busybox sh\n")
    assert guest.init.stat().st_mode & 0o111
    assert guest.recipe("minimal").is_file()
    assert (guest.agent / "main.py").is_file()
