"""Stored sandboxes: complete or absent, checked, tidied up after crashes."""

import hashlib
import os
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3

from support.generations import FILES, SANDBOX_ID, commit, staged
from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host import paused
from wrenn_sandbox.host.images.manifest import FileDigest
from wrenn_sandbox.host.paths import Paths, sync_directory
from wrenn_sandbox.host.paused import PausedSandbox


def tree(paths: Paths) -> set[str]:
    """Every file that is kept of the sandbox."""
    root = paths.stored(SANDBOX_ID)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def everything(generation: int) -> set[str]:
    return {f"{generation}/{name}" for name in (*FILES, "manifest.json")}


def test_what_is_committed_is_found(paths: Paths) -> None:
    assert paused.newest(paths, SANDBOX_ID) is None
    assert paused.all_ids(paths) == []
    manifest = commit(paths, 1)
    assert paused.newest(paths, SANDBOX_ID) == manifest
    assert paused.all_ids(paths) == [SANDBOX_ID]
    assert tree(paths) == everything(1)
    paused.check(paths, manifest)
    path = paths.generation(SANDBOX_ID, 1) / "manifest.json"
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_only_staged_is_not_found(paths: Paths) -> None:
    staged(paths, 1)
    assert paused.newest(paths, SANDBOX_ID) is None
    staged(paths, 1)
    paused.unstage(paths, SANDBOX_ID, 1)
    assert paused.all_ids(paths) == []


def test_a_stage_that_fails_leaves_the_older_generation(paths: Paths) -> None:
    first = commit(paths, 1)
    staged(paths, 2, (1,))
    paused.unstage(paths, SANDBOX_ID, 2)
    assert paused.newest(paths, SANDBOX_ID) == first
    assert tree(paths) == everything(1)


def test_unstaging_what_was_never_staged(paths: Paths) -> None:
    """As when the disk was too full to make the directory."""
    paused.unstage(paths, SANDBOX_ID, 1)
    assert paused.all_ids(paths) == []


@pytest.mark.parametrize("missing", FILES)
def test_a_commit_that_fails_shows_nothing(paths: Paths, missing: str) -> None:
    manifest = staged(paths, 1)
    (paths.stored(SANDBOX_ID) / "1.new" / missing).unlink()
    with pytest.raises(FileNotFoundError):
        paused.commit(paths, manifest)
    assert paused.newest(paths, SANDBOX_ID) is None
    paused.unstage(paths, SANDBOX_ID, 1)
    assert paused.all_ids(paths) == []


def test_a_failure_after_the_commit_can_be_undone(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine runs on then: what was stored must not be there for the next start."""
    first = commit(paths, 1)
    paused.consume(paths, first)
    manifest = staged(paths, 2, (1,))
    real = sync_directory

    def fail(path: Path) -> None:
        if path == paths.stored(SANDBOX_ID):
            raise OSError(5, "input/output error")
        real(path)

    monkeypatch.setattr(paused, "sync_directory", fail)
    with pytest.raises(OSError, match="input/output"):
        paused.commit(paths, manifest)
    monkeypatch.undo()
    paused.unstage(paths, SANDBOX_ID, 2)
    assert paused.newest(paths, SANDBOX_ID) is None
    assert tree(paths) == everything(1) - {"1/manifest.json"}


def test_a_commit_takes_the_place_of_what_is_not_needed(paths: Paths) -> None:
    paused.consume(paths, commit(paths, 1))
    paused.consume(paths, commit(paths, 2, (1,)))
    third = commit(paths, 3, (2,))
    assert paused.newest(paths, SANDBOX_ID) == third
    assert tree(paths) == {"2/disk", *everything(3)}


def test_a_consumed_generation_cannot_be_gone_back_to(paths: Paths) -> None:
    manifest = commit(paths, 1)
    paused.consume(paths, manifest)
    assert paused.newest(paths, SANDBOX_ID) is None
    paused.consume(paths, manifest)
    paused.strip(paths, SANDBOX_ID, (1,))
    assert tree(paths) == {"1/disk"}
    paused.strip(paths, SANDBOX_ID, (1,))


def test_a_crash_while_consuming(paths: Paths) -> None:
    """The manifest goes first; what is left is tidied up behind the sandbox that runs."""
    commit(paths, 1)
    (paths.generation(SANDBOX_ID, 1) / "manifest.json").unlink()
    staged(paths, 2, (1,))
    paused.settle(paths, SANDBOX_ID, (1,))
    assert tree(paths) == {"1/disk"}
    paused.settle(paths, SANDBOX_ID, ())
    assert paused.all_ids(paths) == []


def test_the_newest_complete_one_counts(paths: Paths) -> None:
    first = commit(paths, 1)
    second = commit(paths, 2, (1,))
    staged(paths, 3, (1, 2))
    paths.generation(SANDBOX_ID, 10).mkdir()
    assert paused.newest(paths, SANDBOX_ID) == second != first
    paused.keep(paths, SANDBOX_ID, {1, 2})
    assert {path.name for path in paths.stored(SANDBOX_ID).iterdir()} == {"1", "2"}
    paused.keep(paths, SANDBOX_ID, ())
    paused.keep(paths, SANDBOX_ID, ())
    assert paused.all_ids(paths) == []


def test_damage_of_what_a_former_server_stored_is_found(paths: Paths) -> None:
    """It used SHA-256."""
    manifest = commit(paths, 1)
    files = {
        name: FileDigest(
            entry.size,
            hashlib.sha256((paths.generation(SANDBOX_ID, 1) / name).read_bytes()).hexdigest(),
        )
        for name, entry in manifest.files.items()
    }
    former = msgspec.structs.replace(manifest, files=files)
    paused.check(paths, former)
    path = paths.generation(SANDBOX_ID, 1) / FILES[0]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(IncompatibleImage, match="has changed"):
        paused.check(paths, former)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found(paths: Paths, name: str) -> None:
    manifest = commit(paths, 1)
    path = paths.generation(SANDBOX_ID, 1) / name
    good = path.read_bytes()
    for bad in (good[:-1], good + b"\0", bytes([good[0] ^ 1]) + good[1:], b""):
        path.write_bytes(bad)
        with pytest.raises(IncompatibleImage, match=name) as caught:
            paused.check(paths, manifest)
        assert str(paths.data_dir) not in str(caught.value)
    path.unlink()
    with pytest.raises(IncompatibleImage, match="missing"):
        paused.check(paths, manifest)
    path.write_bytes(good)
    paused.check(paths, manifest)


def test_a_missing_layer_is_found(paths: Paths) -> None:
    paused.consume(paths, commit(paths, 1))
    manifest = commit(paths, 2, (1,))
    paused.check(paths, manifest)
    (paths.generation(SANDBOX_ID, 1) / "disk").unlink()
    with pytest.raises(IncompatibleImage, match="layer"):
        paused.check(paths, manifest)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"format_version": 1}',
        b'{"format_version": 2}',
        b'{"format_version": "1"}',
        b'{"format_version": 1, "x": ' + b"[" * 100_000,
    ],
)
def test_a_generation_whose_manifest_cannot_be_read_is_refused(paths: Paths, data: bytes) -> None:
    commit(paths, 1)
    path = paths.generation(SANDBOX_ID, 1) / "manifest.json"
    path.write_bytes(data)
    with pytest.raises(IncompatibleImage):
        paused.newest(paths, SANDBOX_ID)


def test_manifests_say_all(paths: Paths) -> None:
    commit(paths, 1)
    manifest = commit(paths, 2, (1,))
    data = (paths.generation(SANDBOX_ID, 2) / "manifest.json").read_bytes()
    assert msgspec.json.decode(data, type=PausedSandbox) == manifest
    assert set(manifest.files) == set(FILES)


@pytest.mark.root
def test_a_disk_is_taken_without_a_copy(paths: Paths, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    overlay.write_bytes(b"content")
    os.chown(overlay, 720_001, 720_001)
    directory = paused.stage(paths, SANDBOX_ID, 1)
    entry = paused.take_disk(directory, overlay)
    assert os.path.samefile(directory / "disk", overlay)
    assert entry.size == 7
    assert entry.blake3 == blake3(overlay.read_bytes()).hexdigest()
    assert overlay.stat().st_uid == 0


def test_a_link_in_the_place_of_a_disk_is_not_followed(paths: Paths, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"not for guests")
    secret.chmod(0o600)
    os.symlink(secret, tmp_path / "overlay")
    directory = paused.stage(paths, SANDBOX_ID, 1)
    with pytest.raises(OSError, match="symbolic links"):
        paused.take_disk(directory, tmp_path / "overlay")
    assert secret.stat().st_nlink == 1


@pytest.mark.root
def test_shared_disks_can_be_read_by_one_group_and_written_by_nobody(paths: Paths) -> None:
    paused.consume(paths, commit(paths, 1))
    commit(paths, 2, (1,))
    paused.share_disks(paths, SANDBOX_ID, (1, 2), 720_123)
    for generation in (1, 2):
        status = (paths.generation(SANDBOX_ID, generation) / "disk").stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, 720_123, 0o440)


@pytest.mark.root
def test_a_pause_takes_the_disks_back_from_the_group_that_could_read_them(paths: Paths) -> None:
    """The number of a slot's user is another sandbox's soon."""
    first = commit(paths, 1)
    paused.share_disks(paths, SANDBOX_ID, (1,), 720_123)
    paused.consume(paths, first)
    commit(paths, 2, (1,))
    status = (paths.generation(SANDBOX_ID, 1) / "disk").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, 0, 0o600)


@pytest.mark.root
def test_disks_are_taken_back_also_where_one_is_missing(paths: Paths) -> None:
    commit(paths, 1)
    paused.share_disks(paths, SANDBOX_ID, (1,), 720_123)
    paused.withdraw_disks(paths, SANDBOX_ID, (7, 1))
    assert (paths.generation(SANDBOX_ID, 1) / "disk").stat().st_gid == 0
