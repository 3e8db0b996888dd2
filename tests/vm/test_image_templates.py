"""Templates that were made of OCI images, in real VMs: any root will do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.oci import TOOLS, Entry, Layout, directory, make_layout, program, symlink
from support.vm.rig import Api, Rig
from wrenn_sandbox.host.paths import Paths

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(not TOOLS, reason="there are no skopeo and umoci here"),
]

_APPLETS = ("ash", "cat", "env", "id", "ls", "pwd", "sh", "sync", "true")
_SHOW = 'echo "$(id -u):$(id -g) $PWD $GREETING $HOME"'


@pytest.fixture(scope="module")
def scratch(images: Path, rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A template of an image with one static program and nothing else."""
    layout = make_layout(
        tmp_path_factory.mktemp("scratch") / "image",
        [program("busybox"), directory("data", owner=(4321, 0))],
        config={"Env": ["GREETING=hello", "PATH=/"], "User": "4321", "WorkingDir": "/data"},
    )
    return _built(images, rig, "scratch", layout)


@pytest.fixture(scope="module")
def alpine(images: Path, rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A template of an image like Alpine's: links to a busybox, no bash, `/usr` apart."""
    layout = make_layout(
        tmp_path_factory.mktemp("alpine") / "image",
        [
            *(directory(name) for name in ("bin", "etc", "home", "usr", "usr/bin", "lib")),
            program("bin/busybox"),
            *(symlink(f"bin/{name}", "/bin/busybox") for name in _APPLETS),
        ],
        [
            Entry("etc/passwd", b"root:x:0:0::/root:/bin/ash\napp:x:77:78::/home/app:/bin/ash\n"),
            Entry("etc/group", b"root:x:0:\napp:x:78:\n"),
            directory("home/app", owner=(77, 78)),
        ],
        config={"Env": ["GREETING=hello"], "User": "app"},
    )
    return _built(images, rig, "alpine", layout)


def _built(images: Path, rig: Rig, name: str, layout: Layout) -> str:
    """Build a template for a server that runs; what packages are needed for was kept before."""
    kept = Paths(rig.data_dir).cache
    for step in (*Paths(images).cache.glob("kernel-*"), *Paths(images).cache.glob("runtime-*")):
        subprocess.run(["cp", "-al", "--no-clobber", step, kept], check=True)
    argv = [sys.executable, "-m", "wrenn_sandbox", "template", "build", name]
    subprocess.run(
        [*argv, "--from", layout.reference],
        check=True,
        env={**os.environ, "WRENN_DATA_DIR": str(rig.data_dir)},
    )
    return name


def test_one_static_program_is_enough_for_a_template(scratch: str, api: Api) -> None:
    sandbox = api.create(template=scratch).id
    shown = api.exec(sandbox, "busybox", "sh", "-c", "cd . && busybox id -u && echo $PWD $GREETING")
    assert shown.stdout == "4321\n/data hello\n"
    own = api.exec(sandbox, "/busybox", "env", envs={"GREETING": "own"}, cwd="/", user="root")
    assert "GREETING=own" in own.stdout.splitlines()
    assert api.exec(sandbox, "/bin/sh", "-c", "true").exit_code == 127
    api.pause(sandbox)
    api.resume(sandbox)
    assert api.exec(sandbox, "busybox", "pwd").stdout == "/data\n"


def test_a_root_with_a_busybox_in_the_place_of_bash_serves_clients_that_ask_for_bash(
    alpine: str, api: Api
) -> None:
    sandbox = api.create(template=alpine).id
    for shell in ("/bin/sh", "/bin/bash"):
        result = api.exec(sandbox, shell, "-l", "-c", _SHOW)
        assert result.stdout == "77:78 /home/app hello /home/app\n", result
    written = api.exec(sandbox, "sh", "-c", "echo kept >~/file && cat ~/file /etc/hostname")
    assert written.stdout == f"kept\n{sandbox}\n"
