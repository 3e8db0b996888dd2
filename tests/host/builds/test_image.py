"""Root disks of OCI images, with the real programs: what they hold, and what is refused."""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support.oci import (
    REGISTRY,
    TOOLS,
    Entry,
    Layout,
    archive,
    content_of,
    directory,
    hard_link,
    make_index,
    make_layout,
    make_layout_of,
    names_in,
    push,
    registry,
    stat_of,
    symlink,
    xattr_of,
)
from support.vm.rig import eventually
from wrenn_sandbox.errors import HostFailure, InvalidRequest, NoSpace, NotFound, WrennError
from wrenn_sandbox.host.builds.image import root_of
from wrenn_sandbox.host.builds.pull import Access, Pull
from wrenn_sandbox.host.builds.reference import parse
from wrenn_sandbox.host.images.manifest import Defaults
from wrenn_sandbox.host.paths import Paths

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(not TOOLS, reason="there are no skopeo and umoci here"),
]

_DISK_MB = 64
_HELLO = (Entry("hello", b"hello"),)


_BUILD = """
import sys
from pathlib import Path
from wrenn_sandbox.host.builds.image import root_of
from wrenn_sandbox.host.builds.pull import Access, Pull
from wrenn_sandbox.host.builds.reference import parse
from wrenn_sandbox.host.paths import Paths

paths, size = Paths(Path(sys.argv[1])), int(sys.argv[3])
with root_of(parse(sys.argv[2]), Pull(paths, Access(), size, 1, 1024)) as root:
    (paths.cache / "disk").mkdir()
    root.make(paths.cache / "disk/disk", size)
"""


def pull_of(paths: Paths, **other: object) -> Pull:
    given: dict[str, object] = {"access": Access(), "limit_mb": _DISK_MB, "reserve_mb": 1}
    return Pull(paths, **{"kept_mb": 1024, **given, **other})  # type: ignore[arg-type]


def made(
    paths: Paths, layout: Layout | str, pull: Pull | None = None, disk_mb: int = _DISK_MB
) -> Path:
    """The root disk of an image."""
    reference = layout if isinstance(layout, str) else layout.reference
    place = Path(tempfile.mkdtemp(dir=paths.data_dir))
    try:
        with root_of(parse(reference), pull or pull_of(paths)) as root:
            root.make(place / "disk", disk_mb)
    except WrennError:
        assert list(place.iterdir()) == []
        raise
    assert [each.name for each in place.iterdir()] == ["disk"]
    return place / "disk"


def defaults_of(paths: Paths, layout: Layout) -> Defaults:
    with root_of(parse(layout.reference), pull_of(paths)) as root:
        return root.defaults


def refusal(
    paths: Paths, layout: Layout | str, pull: Pull | None = None, disk_mb: int = _DISK_MB
) -> WrennError:
    """Why there is no disk of an image; nothing is left but whole layers then."""
    with pytest.raises(WrennError) as caught:
        made(paths, layout, pull, disk_mb)
    assert list(paths.cache.iterdir()) == []
    for each in paths.layers.iterdir():
        assert hashlib.sha256(each.read_bytes()).hexdigest() == each.name
    mounts = Path("/proc/self/mountinfo").read_text()
    assert str(paths.data_dir) not in mounts
    return caught.value


def test_owners_modes_attributes_and_kinds_of_files_are_kept(paths: Paths, tmp_path: Path) -> None:
    layout = make_layout(
        tmp_path / "image",
        [
            directory("srv", 0o2775, (7, 8)),
            Entry("srv/tool", b"#!", mode=0o4755, owner=(1234, 55), xattrs={"user.note": "kept"}),
            symlink("srv/away", "/etc/shadow"),
            hard_link("srv/same", "srv/tool"),
            Entry("srv/pipe", kind=tarfile.FIFOTYPE, mode=0o600),
            Entry("srv/null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3)),
        ],
    )
    disk = made(paths, layout)
    top, tool, same = (stat_of(disk, name) for name in ("/srv", "/srv/tool", "/srv/same"))
    assert top is not None
    assert tool is not None
    assert same is not None
    assert (top.kind, top.mode, top.owner) == ("directory", 0o2775, (7, 8))
    assert (tool.mode, tool.owner, tool.links) == (0o4755, (1234, 55), 2)
    assert same.inode == tool.inode
    assert "kept" in xattr_of(disk, "/srv/tool", "user.note")
    kinds = {name: stat_of(disk, f"/srv/{name}") for name in ("away", "pipe", "null")}
    assert {name: found and found.kind for name, found in kinds.items()} == {
        "away": "symlink",
        "pipe": "FIFO",
        "null": "character special",
    }


def test_upper_layers_remove_replace_and_link_what_lower_ones_hold(
    paths: Paths, tmp_path: Path
) -> None:
    layout = make_layout(
        tmp_path / "image",
        [
            *(directory(name) for name in ("kept", "opaque", "bin")),
            Entry("kept/gone", b"x"),
            Entry("kept/stays", b"lower"),
            Entry("opaque/hidden", b"x"),
            Entry("changed", b"a file"),
        ],
        [
            Entry("kept/.wh.gone"),
            Entry("opaque/.wh..wh..opq"),
            Entry("opaque/shown", b"upper"),
            hard_link("across", "kept/stays"),
            directory("changed"),
            Entry("changed/within", b"x"),
        ],
    )
    disk = made(paths, layout)
    assert names_in(disk, "/kept") == {"stays"}
    assert names_in(disk, "/opaque") == {"shown"}
    assert names_in(disk, "/changed") == {"within"}
    assert content_of(disk, "/across") == "lower"


def test_the_files_of_a_guest_replace_those_of_the_image(paths: Paths, tmp_path: Path) -> None:
    host = tmp_path / "of-the-host"
    host.write_text("mine")
    layout = make_layout(
        tmp_path / "image",
        [
            directory("etc"),
            symlink("etc/hosts", str(host)),
            symlink("etc/resolv.conf", "../run/elsewhere"),
            directory("etc/hostname"),
            Entry("etc/hostname/file", b"x"),
        ],
    )
    disk = made(paths, layout)
    assert content_of(disk, "/etc/hostname") == "sandbox\n"
    assert "127.0.0.1 localhost" in content_of(disk, "/etc/hosts")
    assert content_of(disk, "/etc/resolv.conf").startswith("nameserver ")
    assert host.read_text() == "mine"


def test_an_image_without_anything_becomes_a_disk(paths: Paths, tmp_path: Path) -> None:
    disk = made(paths, make_layout(tmp_path / "image"))
    assert names_in(disk, "/") == {"etc"}


def test_the_same_image_gives_the_same_disk(paths: Paths, tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "image", [Entry("deep/er/file", b"x"), symlink("link", "deep")])
    first = hashlib.sha256(made(paths, layout).read_bytes()).hexdigest()
    assert hashlib.sha256(made(paths, layout).read_bytes()).hexdigest() == first


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/out", "./../out"])
def test_no_name_leads_out_of_the_root(name: str, paths: Paths, tmp_path: Path) -> None:
    disk = made(paths, make_layout(tmp_path / "image", [directory("a"), Entry(name, b"x")]))
    assert content_of(disk, "/out") == "x"
    assert list(tmp_path.rglob("out")) == []


def test_no_link_leads_out_of_the_root(paths: Paths, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    layout = make_layout(
        tmp_path / "image",
        [symlink("way", str(victim)), symlink("up", "../../../../.."), symlink(".", str(victim))],
        [Entry("way/planted", b"x"), Entry(f"up{victim}/planted", b"x")],
    )
    with suppress(InvalidRequest):
        made(paths, layout)
    assert list(victim.iterdir()) == []


def test_a_hard_link_to_a_file_of_the_host_is_refused(paths: Paths, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    error = refusal(paths, make_layout(tmp_path / "image", [hard_link("mine", str(victim))]))
    assert error.message == "The image's layers cannot be unpacked"
    assert victim.stat().st_nlink == 1


def test_a_layer_bomb_ends_at_the_size_of_the_disk(paths: Paths, tmp_path: Path) -> None:
    zeros = tmp_path / "zeros.tar"
    with zeros.open("wb") as file:  # an archive of one file of zeros, most of them a hole
        info = tarfile.TarInfo("bomb")
        info.size = 128 << 20
        file.write(info.tobuf())
        file.truncate(512 + info.size + 1024)
    packed = subprocess.run(["gzip", "-1c", zeros], check=True, capture_output=True).stdout
    digest = subprocess.run(["sha256sum", zeros], check=True, capture_output=True).stdout.split()[0]
    zeros.unlink()
    layout = make_layout_of(tmp_path / "image", [packed], [digest.decode()])
    error = refusal(paths, layout, disk_mb=16)
    assert error.message == "The image does not fit on the template's disk of 16 MB"
    assert isinstance(error, InvalidRequest)


def test_more_files_than_the_disk_has_room_for_are_refused(paths: Paths, tmp_path: Path) -> None:
    files = [Entry(f"{number // 1000}/{number}") for number in range(5_000)]
    error = refusal(paths, make_layout(tmp_path / "image", files), disk_mb=16)
    assert error.message == "The image does not fit on the template's disk of 16 MB"


def test_a_fetch_of_more_than_the_disk_holds_is_ended(paths: Paths, tmp_path: Path) -> None:
    layers = [[Entry("noise", os.urandom(3 << 20))] for _ in range(8)]
    layout = make_layout(tmp_path / "image", *layers)
    with registry_of(tmp_path, layout) as name:
        slow = pull_of(paths, access=Access(insecure=True), limit_mb=2)
        error = refusal(paths, name, slow)
    assert error.message == "The image is larger than the template's disk of 2 MB"


def test_a_host_without_room_is_told_of_before_it_is_full(paths: Paths, tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "image", [Entry("noise", os.urandom(40 << 20))])
    error = refusal(paths, layout, pull_of(paths, reserve_mb=1 << 30))
    assert isinstance(error, NoSpace)


def test_an_image_for_another_machine_is_refused(paths: Paths, tmp_path: Path) -> None:
    error = refusal(paths, make_layout(tmp_path / "image", _HELLO, platform=("linux", "arm64")))
    assert error.message == "The image is for linux/arm64; templates are made of linux/amd64 alone"


def test_of_an_image_for_many_machines_that_for_this_one_is_taken(
    paths: Paths, tmp_path: Path
) -> None:
    several = make_index(tmp_path / "several", [("linux", "arm64"), ("linux", "amd64")])
    assert made(paths, several).exists()
    others = make_index(tmp_path / "others", [("linux", "arm64"), ("windows", "amd64")])
    error = refusal(paths, others)
    assert error.message.startswith("The image is for linux/arm64, windows/amd64;")


def test_a_layer_that_is_not_what_the_image_says_is_refused(paths: Paths, tmp_path: Path) -> None:
    packed = gzip.compress(archive(_HELLO))
    wrong = make_layout_of(tmp_path / "diff", [packed], ["0" * 64])
    error = refusal(paths, wrong)
    assert error.message == (
        "The image is damaged: a layer does not have the digest that it should"
    )
    assert list(paths.layers.iterdir()) == []
    lying = make_layout(tmp_path / "lying", _HELLO)
    [layer] = lying.layers()
    layer.write_bytes(gzip.compress(archive([Entry("other", b"other")]), 1, mtime=0))
    assert "damaged" in refusal(paths, lying).message


def test_a_layer_that_breaks_off_is_refused(paths: Paths, tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "image", [Entry("noise", os.urandom(1 << 20))])
    [layer] = layout.layers()
    layer.write_bytes(layer.read_bytes()[:1000])
    assert "damaged" in refusal(paths, layout).message


def test_layers_of_an_unknown_kind_are_refused(paths: Paths, tmp_path: Path) -> None:
    kind = "application/vnd.oci.image.layer.v1.tar+zstd"
    error = refusal(paths, make_layout(tmp_path / "image", _HELLO, media_type=kind))
    assert f"layers of the kind '{kind}'" in error.message


def test_what_an_image_says_of_its_processes_becomes_the_defaults(
    paths: Paths, tmp_path: Path
) -> None:
    config = {
        "Env": ["PATH=/app/bin:/bin", "EMPTY=", "A=b=c"],
        "User": "1000:app",
        "WorkingDir": "/app",
        "Entrypoint": ["/app/run"],
        "Cmd": ["--serve"],
    }
    assert defaults_of(paths, make_layout(tmp_path / "image", config=config)) == Defaults(
        user="1000:app",
        workdir="/app",
        env={"PATH": "/app/bin:/bin", "EMPTY": "", "A": "b=c"},
        entrypoint=("/app/run",),
        cmd=("--serve",),
    )
    nulls = {"Env": None, "User": "", "WorkingDir": "", "Entrypoint": None, "Cmd": None}
    assert defaults_of(paths, make_layout(tmp_path / "nulls", config=nulls)) == Defaults()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"User": "a b"}, "user is not valid"),
        ({"User": "a:b:c"}, "user is not valid"),
        ({"WorkingDir": "/\0"}, "working directory is not valid"),
        ({"Env": ["=x"]}, "environment is not valid"),
        ({"Env": ["A=\0"]}, "environment is not valid"),
        ({"Env": [f"A{number}=" for number in range(1025)]}, "larger than 1024 variables"),
        ({"Env": ["A=" + "x" * (64 << 10)]}, "or 64 KB"),
        ({"Cmd": ["x" * (64 << 10), "x"]}, "command is longer than 64 KB"),
        ({"Env": "A=b"}, "cannot be read"),
    ],
)
def test_a_configuration_that_no_command_can_have_is_refused(
    config: Mapping[str, object], message: str, paths: Paths, tmp_path: Path
) -> None:
    layout = make_layout(tmp_path / "image", config=config)
    with pytest.raises(InvalidRequest, match=message):
        defaults_of(paths, layout)


@pytest.mark.parametrize("text", ["oci:/nowhere", "docker-archive:/nowhere", "dir:/nowhere"])
def test_an_image_that_is_not_there_is_not_found(text: str, paths: Paths) -> None:
    error = refusal(paths, text)
    assert isinstance(error, NotFound)
    assert error.message == f"There is no image {text}"


def test_a_registry_that_cannot_be_reached_is_told_of(paths: Paths) -> None:
    error = refusal(paths, "docker://127.0.0.1:9/nothing:1")
    assert isinstance(error, HostFailure)
    assert error.message.startswith("The registry cannot be reached")


def test_layers_are_shared_and_the_oldest_are_dropped(paths: Paths, tmp_path: Path) -> None:
    base = [Entry("noise", os.urandom(1 << 20))]
    one = make_layout(tmp_path / "one", base, [Entry("one", b"1")])
    two = make_layout(tmp_path / "two", base, [Entry("two", b"2")])
    made(paths, one)
    [shared] = set(one.layers()[0].parts[-1:])
    kept = paths.layers / shared
    inode = kept.stat().st_ino
    made(paths, two)
    assert kept.stat().st_ino == inode
    assert len(list(paths.layers.iterdir())) == 2 * 4 - 1
    third = make_layout(tmp_path / "three", [Entry("noise", os.urandom(1 << 20))])
    made(paths, third, pull_of(paths, kept_mb=1))
    assert not kept.exists()


def test_an_archive_of_an_image_becomes_a_disk(paths: Paths, tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "image", _HELLO)
    for kind in ("docker-archive", "oci-archive"):
        saved = f"{kind}:{tmp_path / kind}"
        subprocess.run(["skopeo", "copy", "-q", layout.reference, saved], check=True)
        assert content_of(made(paths, saved), "/hello") == "hello"


def test_an_image_of_a_registry_becomes_a_disk(paths: Paths, tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "image", _HELLO)
    with registry_of(tmp_path, layout) as name:
        open_to_all = pull_of(paths, access=Access(insecure=True))
        disk = made(paths, name, open_to_all)
        assert content_of(disk, "/hello") == "hello"
        missing = refusal(paths, name + "-not", open_to_all)
        assert isinstance(missing, NotFound)
        assert missing.message == f"The registry has no image docker://{name}-not"
        assert "--insecure" in refusal(paths, name, pull_of(paths)).message


def test_a_build_that_is_killed_leaves_files_for_the_next_one_to_remove(
    paths: Paths, tmp_path: Path
) -> None:
    layout = make_layout(tmp_path / "image", [Entry(f"many/{n}") for n in range(16_000)])
    argv = [sys.executable, "-c", _BUILD, str(paths.data_dir), layout.reference, str(_DISK_MB)]
    build = subprocess.Popen(argv)
    place = paths.cache / "disk"
    assert eventually(lambda: unpackers(paths) != [], within=60)
    build.kill()
    build.wait()
    assert eventually(lambda: unpackers(paths) == [], within=20)
    loops = ["losetup", "--associated", str(place / "unpacked.ext4")]
    assert eventually(lambda: subprocess.check_output(loops) == b"", within=20)
    assert str(paths.data_dir) not in Path("/proc/self/mountinfo").read_text()
    shutil.rmtree(place)
    assert len(list(paths.cache.glob(".staging-*"))) == 1
    made(paths, make_layout(tmp_path / "other", _HELLO))
    assert list(paths.cache.iterdir()) == []


def unpackers(paths: Paths) -> list[str]:
    """The running programs that unpack something of this data directory."""
    found = subprocess.run(
        ["ps", "-ewwo", "args"], check=True, capture_output=True, text=True
    ).stdout
    return [each for each in found.splitlines() if "umoci" in each and str(paths.data_dir) in each]


@contextmanager
def registry_of(tmp_path: Path, layout: Layout) -> Iterator[str]:
    """The name of an image in a registry that was started for it."""
    if REGISTRY is None:
        pytest.skip("there is no docker-registry here")
    with registry(tmp_path / "registry") as address:
        name = f"{address}/made/image:1"
        push(layout, name)
        yield name
