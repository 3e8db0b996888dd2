"""Kernel modules: dependencies first, built-in ones left out, missing ones named."""

import lzma
from pathlib import Path

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.images.modules import dependencies, load_order


def module(depends: str) -> bytes:
    return b"\x7fELF...license=GPL\0depends=" + depends.encode() + b"\0retpoline=Y\0"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "kernel/net").mkdir(parents=True)
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    (tmp_path / "kernel/net/base.ko").write_bytes(module(""))
    (tmp_path / "kernel/net/mid-dle.ko").write_bytes(module("base"))
    (tmp_path / "kernel/net/top.ko.xz").write_bytes(lzma.compress(module("mid_dle,base,ext4")))
    return tmp_path


def test_dependencies_come_first_and_once(tree: Path) -> None:
    order = load_order(tree, ["top", "base", "ext4"])
    assert [name for name, _ in order] == ["base", "mid_dle", "top"]
    assert order[2][1] == module("mid_dle,base,ext4")


def test_dashes_and_underscores_are_the_same(tree: Path) -> None:
    assert [name for name, _ in load_order(tree, ["mid-dle"])] == ["base", "mid_dle"]


def test_a_missing_module_is_named(tree: Path) -> None:
    with pytest.raises(HostFailure, match="no module absent"):
        load_order(tree, ["absent"])


def test_dependencies_of_a_file_without_any() -> None:
    assert dependencies(b"nothing here") == []
    assert dependencies(module("a,b-c")) == ["a", "b-c"]
