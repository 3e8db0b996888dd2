"""The archive writer: what another program reads from it, and that the same gives the same."""

import subprocess
from pathlib import Path

import pytest

from wrenn_sandbox.host.images import cpio

ENTRIES = [
    cpio.file("bin/tool", b"#!x", 0o755),
    cpio.directory("bin"),
    cpio.link("bin/other", "tool"),
    cpio.file("init", b"12345", 0o755),
    cpio.file("empty", b""),
    cpio.file("bin.late", b"z"),
]


def test_cpio_unpacks_what_was_packed(tmp_path: Path) -> None:
    subprocess.run(
        ["cpio", "-i", "--quiet", "--no-absolute-filenames"],
        input=cpio.archive(ENTRIES),
        cwd=tmp_path,
        check=True,
    )
    assert (tmp_path / "bin/tool").read_bytes() == b"#!x"
    assert (tmp_path / "bin/tool").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "bin/other").readlink() == Path("tool")
    assert (tmp_path / "init").read_bytes() == b"12345"
    assert (tmp_path / "empty").read_bytes() == b""


def test_order_of_the_entries_does_not_matter() -> None:
    assert cpio.archive(ENTRIES) == cpio.archive(reversed(ENTRIES))


@pytest.mark.parametrize(
    "entries",
    [
        [cpio.file("a", b""), cpio.file("a", b"")],
        [cpio.file("a/b", b"")],
        [cpio.directory("/a")],
    ],
)
def test_entries_that_could_not_be_unpacked_are_refused(entries: list[cpio.Entry]) -> None:
    with pytest.raises(ValueError, match="duplicate, absolute or without"):
        cpio.archive(entries)
