"""A borrowed data directory takes nothing from the one it borrows from."""

from pathlib import Path

from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.ids import ImageId
from wrenn_sandbox.testing.data_dir import working_directory


def test_images_are_shared_and_kept(tmp_path: Path) -> None:
    source = Paths(tmp_path / "data")
    source.prepare()
    image = source.image(ImageId("img-1"))
    image.mkdir()
    disk = image / "disk"
    disk.write_text("a disk")
    source.template("minimal").write_text("img-1")
    (source.data_dir / "wrenn.db").touch()
    with working_directory(source.data_dir, "test") as directory:
        assert directory.parent == tmp_path
        assert directory.stat().st_mode & 0o777 == 0o711
        borrowed = Paths(directory).image(ImageId("img-1")) / "disk"
        assert borrowed.samefile(disk)
        borrowed.unlink()
        assert Paths(directory).template("minimal").read_text() == "img-1"
        assert not (directory / "wrenn.db").exists()
    assert not directory.exists()
    assert disk.read_text() == "a disk"


def test_without_any_image(tmp_path: Path) -> None:
    with working_directory(tmp_path / "missing" / "data", "test") as directory:
        assert Paths(directory).images.is_dir()
    assert not directory.exists()
