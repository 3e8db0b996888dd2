"""Recipes: the one that comes with the product, and what is refused with which words."""

from pathlib import Path

import pytest

from wrenn_sandbox.errors import InvalidRequest, NotFound
from wrenn_sandbox.host.images import recipe
from wrenn_sandbox.host.paths import guest_files

GOOD = """
name = "small"
suite = "bookworm"
packages = ["busybox"]
[kernel]
package = "linux-image-cloud-amd64"
modules = ["virtio_blk"]
[runtime]
packages = ["python3-minimal"]
"""


def test_the_recipes_that_come_with_the_product() -> None:
    minimal = recipe.load(guest_files().recipe("minimal"))
    assert minimal.name == "minimal"
    wanted = "bash coreutils python3 python3-pip git curl ca-certificates kmod procps sudo tar"
    assert set(wanted.split()) <= set(minimal.packages)
    developer = recipe.load(guest_files().recipe("developer"))
    assert developer.name == "developer"
    assert {*minimal.packages, "build-essential", "nodejs", "podman"} <= set(developer.packages)
    assert (developer.kernel, developer.runtime) == (minimal.kernel, minimal.runtime)
    base = recipe.load(guest_files().recipe("base"))
    assert (base.name, base.account, minimal.account) == ("base", "user", None)
    assert {*minimal.packages, "nodejs", "npm", "sudo", "iproute2", "procps"} <= set(base.packages)
    assert (base.kernel, base.runtime) == (minimal.kernel, minimal.runtime)


def test_sizes_have_defaults() -> None:
    machine = recipe.parse(GOOD).machine
    assert (machine.vcpus, machine.memory_mb, machine.disk_mb) == (1, 512, 8192)


def test_digest_ignores_comments_and_changes_with_the_content() -> None:
    digest = recipe.parse(GOOD).digest
    assert recipe.parse("# hello\n" + GOOD).digest == digest
    assert recipe.parse(GOOD.replace("busybox", "dash")).digest != digest


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"small"', '"Small"', "template name"),
        ('"small"', '"../up"', "template name"),
        ('"bookworm"', '"-o"', "suite"),
        ('"bookworm"', '"bookworm\\n"', "suite"),
        ('["busybox"]', "[]", "packages"),
        ('["busybox"]', '["busybox,--x"]', r"\.packages\["),
        ('["busybox"]', '"busybox"', "packages"),
        ('["virtio_blk"]', '["../x"]', r"kernel\.modules"),
        ('["virtio_blk"]', "[]", r"kernel\.modules"),
        ("[kernel]", '[kernel]\nbusybox = "--x"', r"kernel\.busybox"),
        ('["python3-minimal"]', "[]", r"runtime\.packages"),
        ("[kernel]", "[kernel]\nextra = 1", "extra"),
        ("[kernel]", "[machine]\nvcpus = 0\n[kernel]", "vcpus"),
        ("[kernel]", "[machine]\ndisk_mb = 1\n[kernel]", "disk_mb"),
        ("[kernel]", "[machine]\nmemory_mb = 1\n[kernel]", "memory_mb"),
        ("[runtime]", "[runtime", "line"),
        ('package = "linux-image-cloud-amd64"', "", "package"),
    ],
)
def test_a_wrong_recipe_is_refused_by_field(old: str, new: str, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        recipe.parse(GOOD.replace(old, new))


def test_an_unreadable_recipe_names_no_path(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as missing:
        recipe.load(tmp_path / "none.toml")
    assert str(tmp_path) not in str(missing.value)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest) as binary:
        recipe.load(tmp_path / "binary.toml")
    assert str(tmp_path) not in str(binary.value)
