"""A VM of a server of before is adopted, whose disk layer had another name."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from wrenn_sandbox.host.paths import MachineFiles
from wrenn_sandbox.host.vmm.base import MachineSpec
from wrenn_sandbox.host.vmm.qemu.driver import _rename_disk


def test_an_adopted_disk_layer_is_found_by_both_of_its_names(tmp_path: Path) -> None:
    files = MachineFiles(tmp_path)
    former = tmp_path / "disk.qcow2"
    former.write_bytes(b"layer")
    inode = former.stat().st_ino
    spec = cast(MachineSpec, SimpleNamespace(files=files))
    for _ in range(2):
        _rename_disk(spec)
        assert files.overlay.read_bytes() == b"layer"
        assert not files.overlay.is_symlink()
        assert files.overlay.stat().st_ino == former.stat().st_ino == inode
        assert former.is_symlink()
        assert {each.name for each in tmp_path.iterdir()} == {"disk", "disk.qcow2"}


def test_a_vm_of_today_has_one_name_alone(tmp_path: Path) -> None:
    files = MachineFiles(tmp_path)
    files.overlay.write_bytes(b"layer")
    _rename_disk(cast(MachineSpec, SimpleNamespace(files=files)))
    assert [each.name for each in tmp_path.iterdir()] == ["disk"]
