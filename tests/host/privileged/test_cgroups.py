"""Where groups can be, and those of this machine's kernel as far as it has any."""

import os
import subprocess
from pathlib import Path

from wrenn_sandbox.host.privileged.cgroups import Bounds, Groups, hierarchy, usable

BOUNDS = Bounds(memory=1 << 30, cpus=2.0, threads=100)


def made(root: Path, **files: str) -> Path:
    """A group as the kernel would show it."""
    root.mkdir(exist_ok=True)
    for name, text in files.items():
        (root / f"cgroup.{name}").write_text(text)
    return root


def test_the_topmost_group_may_have_all(tmp_path: Path) -> None:
    root = made(tmp_path, controllers="cpuset cpu io memory pids", subtree_control="", procs="1")
    assert usable(root) == ("memory", "cpu", "pids")


def test_a_container_with_processes_has_what_was_given_before(tmp_path: Path) -> None:
    controllers = "cpu memory pids"
    root = made(tmp_path, controllers=controllers, subtree_control="pids", procs="1", type="domain")
    assert usable(root) == ("pids",)
    made(root, procs="")
    assert usable(root) == ("memory", "cpu", "pids")


def test_without_the_hierarchy_there_are_none(tmp_path: Path) -> None:
    assert usable(None) == ()
    assert usable(tmp_path) == ()
    assert usable(tmp_path / "missing") == ()
    mounts = tmp_path / "mounts"
    mounts.write_text("36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n")
    assert hierarchy(mounts) is None
    mounts.write_text("41 31 0:38 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw\n")
    assert hierarchy(mounts) == Path("/sys/fs/cgroup")


def test_each_bound_is_written_where_the_kernel_reads_it(tmp_path: Path) -> None:
    groups = Groups(tmp_path, tmp_path, ("memory", "cpu", "pids"))
    group = tmp_path / "vm-1"
    group.mkdir()
    (group / "memory.swap.max").touch()
    (group / "cgroup.procs").touch()
    os.close(groups.open("vm-1", BOUNDS))
    found = {path.name: path.read_text() for path in group.iterdir()}
    assert found == {
        "memory.max": str(1 << 30),
        "memory.swap.max": str(1 << 30),
        "memory.oom.group": "1",
        "cpu.max": "200000 100000",
        "pids.max": "100",
        "cgroup.procs": "",
    }


def test_a_process_is_in_its_group_until_it_ends(tmp_path: Path) -> None:
    root = hierarchy()
    if root is None:  # nothing to try on a kernel without it; the guest's is tried with all
        assert usable(root) == ()
        return
    name = f"wrenn-unit-{os.getpid()}"
    groups = Groups.make(root, name, tmp_path, ())
    directory = tmp_path / "vm-1"
    directory.mkdir()
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            descriptor = groups.open("vm-1", BOUNDS)
            os.write(descriptor, str(process.pid).encode())
            os.close(descriptor)
            membership = Path(f"/proc/{process.pid}/cgroup").read_text()
            assert f"/{name}/vm-1\n" in membership
            groups.remove("vm-1")
            directory.rmdir()
            groups.close()
            assert (root / name / "vm-1").is_dir()
        finally:
            process.kill()
    directory.mkdir()
    groups.sweep()
    assert (root / name / "vm-1").is_dir()
    directory.rmdir()
    groups.close()
    assert not (root / name).exists()
