"""The steps of a build with the real tools on small trees, and the build as a whole on them."""

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from wrenn_sandbox.errors import HostFailure, InvalidRequest, NoSpace
from wrenn_sandbox.host.images import accounts, disk, initrd, packages, recipe, runtime, tools
from wrenn_sandbox.host.images.build import Step, build_template
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.paths import GuestFiles, Paths

pytestmark = pytest.mark.slow

RECIPE = recipe.parse("""
name = "tiny"
suite = "bookworm"
packages = ["tiny-root"]
[machine]
disk_mb = 64
[kernel]
package = "tiny-kernel"
modules = ["virtio_blk"]
optional_modules = ["overlay"]
[runtime]
packages = ["tiny-python"]
""")


def make_archive(path: Path, order: Sequence[str] = ("bin/tool", "etc/hostname")) -> None:
    with tarfile.open(path, "w") as tar:
        for name in ("./", "./bin", "./dev", "./etc", "./home"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, packages.EPOCH
            entry.uid = 1000 if name == "./home" else 0
            tar.addfile(entry)
        for name in order:
            entry = tarfile.TarInfo("./" + name)
            entry.size, entry.mode, entry.mtime = 3, 0o4755, packages.EPOCH
            tar.addfile(entry, io.BytesIO(b"old"))


def fill_kernel(root: Path) -> None:
    tree = root / "lib/modules/6.1.0-test"
    tree.mkdir(parents=True)
    (root / "boot").mkdir()
    (root / "bin").mkdir()
    (root / "boot/vmlinuz-6.1.0-test").write_bytes(b"kernel")
    (root / "bin/busybox").write_bytes(b"busybox")
    (tree / "modules.builtin").write_text("")
    for name, needs in (("virtio", ""), ("virtio_blk", "virtio"), ("overlay", "")):
        (tree / f"{name}.ko").write_bytes(b"\0depends=" + needs.encode() + b"\0")


def fill_python(root: Path) -> None:
    program = Path("/usr/bin/python3").resolve()
    (root / "usr/bin").mkdir(parents=True)
    shutil.copy2(program, root / "usr/bin")
    keep = {"encodings", "collections", "importlib", "re", "json", "lib-dynload"}
    library = Path("/usr/lib") / program.name
    shutil.copytree(
        library,
        root / "usr/lib" / program.name,
        ignore=lambda directory, names: [
            name
            for name in names
            if Path(directory) == library and (library / name).is_dir() and name not in keep
        ],
    )
    for directory in ("lib/x86_64-linux-gnu",):
        (root / directory).mkdir(parents=True)
        for pattern in ("ld-linux*", "libc.so*", "libm.so*", "libz.so*", "libexpat.so*", "libffi*"):
            for path in Path("/", directory).glob(pattern):
                shutil.copy2(path, root / directory)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "data")


@pytest.fixture
def guest(tmp_path: Path) -> GuestFiles:
    directory = tmp_path / "guest"
    (directory / "agent/wrenn_agent").mkdir(parents=True)
    (directory / "init").mkdir()
    (directory / "init/init").write_text("#!/bin/busybox sh\n")
    (directory / "agent/main.py").write_text(
        "import os, sys\nsys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))\n"
        "import json\nimport wrenn_agent\nprint(json.dumps(wrenn_agent.NAME))\n"
    )
    (directory / "agent/wrenn_agent/__init__.py").write_text('NAME = "agent"\n')
    return GuestFiles(directory)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the package servers; holds what was fetched."""
    names: list[str] = []

    def install(suite: str, wanted: Sequence[str], mirror: str | None, target: Path) -> None:
        names.extend(wanted)
        make_archive(target)

    def unpack(suite: str, wanted: Sequence[str], mirror: str | None, target: Path) -> None:
        names.extend(wanted)
        target.mkdir()
        (fill_kernel if "tiny-kernel" in wanted else fill_python)(target)

    monkeypatch.setattr(packages, "install", install)
    monkeypatch.setattr(packages, "unpack", unpack)
    return names


def debugfs(image: Path, command: str) -> str:
    return tools.run(["debugfs", "-R", command, str(image)]).decode()


def test_a_disk_holds_the_archive_and_our_files(tmp_path: Path) -> None:
    make_archive(tmp_path / "root.tar")
    disk.add_files(tmp_path / "root.tar", disk.GUEST_FILES)
    disk.make_disk(tmp_path / "root.tar", 64, tmp_path / "disk")
    image = tmp_path / "disk"
    assert image.stat().st_size == 64 << 20
    assert image.stat().st_blocks * 512 < 8 << 20
    assert debugfs(image, "cat /etc/hostname") == "sandbox\n"
    assert debugfs(image, "cat /bin/tool") == "old"
    assert "Mode:  04755" in debugfs(image, "stat /bin/tool")
    assert "User:  1000" in debugfs(image, "stat /home")
    tools.run(["e2fsck", "-f", "-n", str(image)])


def test_the_same_files_give_the_same_disk(tmp_path: Path) -> None:
    for number, order in enumerate((("bin/tool", "etc/x"), ("etc/x", "bin/tool"))):
        make_archive(tmp_path / "root.tar", order)
        disk.make_disk(tmp_path / "root.tar", 64, tmp_path / f"disk{number}")
    assert (tmp_path / "disk0").read_bytes() == (tmp_path / "disk1").read_bytes()


def test_the_first_file_system_loads_modules_in_order(tmp_path: Path, guest: GuestFiles) -> None:
    fill_kernel(tmp_path / "root")
    (tmp_path / "out").mkdir()
    initrd.extract(tmp_path / "root", RECIPE.kernel, tmp_path / "out")
    initrd.make_initrd(tmp_path / "out", guest.init, tmp_path / "initrd")
    listing = subprocess.run(
        ["cpio", "-t", "--quiet"],
        input=(tmp_path / "initrd").read_bytes(),
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert {"init", "bin/busybox", "bin/sh", "proc"} <= set(listing.split())
    assert [name for name in listing.split() if name.endswith(".ko")] == [
        "modules/00-virtio.ko",
        "modules/01-virtio_blk.ko",
        "modules/optional/00-overlay.ko",
    ]


def test_the_runtime_needs_nothing_of_the_host(tmp_path: Path, guest: GuestFiles) -> None:
    fill_python(tmp_path / "root")
    [library] = (tmp_path / "root/usr/lib").glob("python3.*")
    (library / "of_the_host.py").symlink_to("/etc/passwd")
    (library / "missing_here.py").symlink_to("/etc/python2.0/missing_here.py")
    for name in ("one", "two"):
        guest.agent.chmod(0o700 if name == "one" else 0o775)
        runtime.make_base(tmp_path / "root", tmp_path / name / "base")
        runtime.add_agent(tmp_path / name / "base", guest.agent, tmp_path / name / "tree")
        runtime.make_image(tmp_path / name / "tree", tmp_path / name / "image")
    tree = tmp_path / "one/tree"
    output = tools.run([*runtime.interpreter(tree), str(tree / "agent/main.py")])
    assert output == b'"agent"\n'
    assert not {"of_the_host.pyc", "missing_here.pyc"} & {path.name for path in tree.rglob("*")}
    sources = [path for path in tree.rglob("*.py") if path.name != "main.py"]
    assert sources == []
    assert (tmp_path / "one/image").read_bytes() == (tmp_path / "two/image").read_bytes()


def test_a_build_and_its_repetitions(paths: Paths, guest: GuestFiles, fetched: list[str]) -> None:
    store, steps = ImageStore(paths), list[Step]()
    first = build_template(RECIPE, store, paths, progress=steps.append, guest=guest)
    assert store.verify(store.resolve("tiny").image_id) == first
    assert sorted(fetched) == sorted(["tiny-root", "tiny-kernel", "busybox-static", "tiny-python"])
    assert not any(step.cached for step in steps)

    fetched.clear()
    steps.clear()
    again = build_template(RECIPE, store, paths, progress=steps.append, guest=guest)
    assert again == first
    # they are made at the same time, so in any order
    assert {step.name for step in steps if step.cached} == {"disk", "kernel", "runtime"}

    (guest.agent / "wrenn_agent/__init__.py").write_text('NAME = "other"\n')
    changed = build_template(RECIPE, store, paths, progress=steps.append, guest=guest)
    assert fetched == []
    assert changed.image_id != first.image_id
    assert {name for name in first.files if first.files[name] != changed.files[name]} == {"runtime"}
    assert store.resolve("tiny") == changed
    assert store.disk(first).stat().st_ino == store.disk(changed).stat().st_ino


def test_new_code_for_the_kernel_takes_it_from_its_package_again(
    paths: Paths,
    guest: GuestFiles,
    fetched: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = ImageStore(paths)
    build_template(RECIPE, store, paths, progress=lambda _: None, guest=guest)
    changed = tmp_path / "initrd.py"
    changed.write_text(Path(initrd.__file__).read_text() + "# another form\n")
    monkeypatch.setattr(initrd, "__file__", str(changed))
    steps: list[Step] = []
    build_template(RECIPE, store, paths, progress=steps.append, guest=guest)
    assert {step.name for step in steps if step.cached} == {"disk", "runtime"}


def test_the_runtime_brings_all_modules_of_the_kernel(
    paths: Paths, guest: GuestFiles, fetched: list[str]
) -> None:
    """With the indexes that programs find them by, and a program that runs."""
    store = ImageStore(paths)
    made = build_template(RECIPE, store, paths, progress=lambda _: None, guest=guest)
    for name, mode in (
        ("bin/modprobe", "0755"),
        ("modules/6.1.0-test/overlay.ko", "0644"),
        ("modules/6.1.0-test/modules.dep", "0644"),
        ("modules/6.1.0-test/modules.alias.bin", "0644"),
    ):
        image = str(store.file(made, "runtime"))
        assert mode in tools.run(["dump.erofs", f"--path=/{name}", image]).decode()


def test_the_same_recipe_gives_the_same_image_elsewhere(
    tmp_path: Path, guest: GuestFiles, fetched: list[str]
) -> None:
    ids = set()
    for name in ("one", "two"):
        paths = Paths(tmp_path / name)
        made = build_template(
            RECIPE, ImageStore(paths), paths, progress=lambda _: None, guest=guest
        )
        ids.add(made.image_id)
    assert len(ids) == 1


def test_a_failed_build_leaves_nothing(
    paths: Paths, guest: GuestFiles, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "/secret/place")

    monkeypatch.setattr(disk, "make_disk", fail)
    store = ImageStore(paths)
    with pytest.raises(NoSpace) as error:
        build_template(RECIPE, store, paths, progress=lambda _: None, guest=guest)
    assert "/secret" not in str(error.value)
    assert store.templates() == []
    assert list(paths.images.iterdir()) == []
    assert not [name for name in os.listdir(paths.cache) if name.startswith((".", "disk"))]


def test_a_missing_agent_is_said(paths: Paths, guest: GuestFiles, fetched: list[str]) -> None:
    (guest.agent / "main.py").unlink()
    with pytest.raises(HostFailure, match="agent's sources"):
        build_template(RECIPE, ImageStore(paths), paths, progress=lambda _: None, guest=guest)
    assert list(paths.images.iterdir()) == []


@pytest.mark.parametrize("mirror", ["-", "--help", "", "  "])
def test_a_mirror_that_is_an_option_is_refused(paths: Paths, mirror: str) -> None:
    with pytest.raises(InvalidRequest, match="mirror"):
        build_template(RECIPE, ImageStore(paths), paths, progress=lambda _: None, mirror=mirror)


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("echo 'E: Temporary failure resolving x' >&2; exit 25", HostFailure, "network"),
        ("echo 'tar: write: No space left on device' >&2; exit 2", NoSpace, "full"),
        (
            "echo 'I: packages'; echo 'E: Unable to locate package nosuch' >&2; exit 100",
            HostFailure,
            "locate package nosuch$",
        ),
        ("echo 'E: unable to pick chroot mode' >&2; exit 25", HostFailure, "without root"),
        ("exit 3", HostFailure, "status 3"),
    ],
)
def test_what_a_tool_complains_about_is_said_in_words(
    script: str, kind: type[HostFailure | NoSpace], message: str
) -> None:
    with pytest.raises(kind, match=message):
        tools.run(["sh", "-c", script])


def test_a_missing_tool_is_named() -> None:
    with pytest.raises(HostFailure, match="no-such-tool is not installed"):
        tools.run(["no-such-tool"])


def test_an_account_is_added_to_what_the_packages_made(tmp_path: Path) -> None:
    archive = tmp_path / "root.tar"
    make_archive(archive, ())
    disk.add_files(
        archive,
        {
            **dict.fromkeys(("etc/passwd", "etc/group", "etc/shadow", "etc/gshadow"), "root:x\n"),
            "etc/skel/.bashrc": "alias ll='ls -l'\n",
        },
    )
    accounts.add(archive, "user")
    subprocess.run(["tar", "-xpf", archive, "-C", tmp_path], check=True)
    assert (tmp_path / "etc/passwd").read_text() == (
        "root:x\nuser:x:1000:1000::/home/user:/bin/bash\n"
    )
    assert (tmp_path / "etc/shadow").read_text().startswith("root:x\nuser:*:")
    assert (tmp_path / "etc/wrenn-user").read_text() == "user\n"
    assert (tmp_path / "etc/sudoers.d/user").stat().st_mode & 0o777 == 0o440
    with tarfile.open(archive) as tar:
        for name in ("./home/user", "./home/user/.bashrc"):
            assert (tar.getmember(name).uid, tar.getmember(name).gid) == (1000, 1000)
