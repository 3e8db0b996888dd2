"""What the agent tells its kernel at boot: limits that fit the memory, links to modules."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from wrenn_agent.boot import device_nodes, link_tree, sysctls

DEVNAME = """# Device nodes to trigger on-demand module loading.
fuse fuse c10:229
tun net/tun c10:200
loop loop-control c10:237
disk some/disk b7:0
"""


@pytest.mark.parametrize(
    ("memory_mb", "watches"), [(64, 65_536), (512, 65_536), (4096, 524_288), (65_536, 1_048_576)]
)
def test_watches_follow_the_memory(memory_mb: int, watches: int) -> None:
    assert sysctls(memory_mb)["fs/inotify/max_user_watches"] == str(watches)


def test_every_setting_is_one_of_the_kernels() -> None:
    """Of those that this machine's kernel has a directory for, none is misspelled."""
    optional = {"kernel/yama/ptrace_scope"}
    for name in sysctls(512).keys() - optional:
        assert Path("/proc/sys", name).exists(), name


def test_modules_are_links_among_which_others_may_be_put(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "lib/modules/1"
    (source / "kernel").mkdir(parents=True)
    (source / "modules.dep").write_text("ours")
    target.mkdir(parents=True)
    (target / "build").symlink_to("/usr/src")  # as a package of headers leaves it
    for _ in range(2):
        link_tree(str(source), str(target))
        assert sorted(os.listdir(target)) == ["build", "kernel", "modules.dep"]
        assert (target / "modules.dep").read_text() == "ours"
    (target / "new").write_text("rebuilt")
    (target / "new").rename(target / "modules.dep")
    assert (source / "modules.dep").read_text() == "ours"


def test_a_root_with_modules_of_its_own_keeps_them(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for tree in source, target:
        (tree / "kernel").mkdir(parents=True)
    (source / "modules.dep").write_text("ours")
    link_tree(str(source), str(target))
    assert os.listdir(target) == ["kernel"]
    assert not (target / "kernel").is_symlink()


def test_devices_are_there_before_their_modules() -> None:
    character, block = stat.S_IFCHR, stat.S_IFBLK
    assert device_nodes(DEVNAME) == [
        ("fuse", character | 0o666, os.makedev(10, 229)),
        ("net/tun", character | 0o666, os.makedev(10, 200)),
        ("loop-control", character | 0o600, os.makedev(10, 237)),
        ("some/disk", block | 0o600, os.makedev(7, 0)),
    ]
