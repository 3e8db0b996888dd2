"""The record of a machine: written whole, read back, ignored when it is not understood."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from ipaddress import IPv4Network
from pathlib import Path

import msgspec
import pytest

from wrenn_sandbox.host import journal
from wrenn_sandbox.host.journal import Record
from wrenn_sandbox.host.network.addressing import AddressPlan
from wrenn_sandbox.host.vmm.base import Process
from wrenn_sandbox.ids import ImageId, MachineId, OperationId, SandboxId
from wrenn_sandbox.wire.messages import Phase


@pytest.fixture
def record() -> Record:
    network = IPv4Network("10.231.0.0/16")
    return Record(
        machine_id=MachineId("vm-" + "a" * 20),
        image_id=ImageId("img-" + "b" * 20),
        vcpus=2,
        memory_mb=512,
        driver="qemu",
        boot_id=journal.boot_id(),
        slot=AddressPlan("abcdef", network, network, 720_000).slot(3),
        phase=Phase.RUNNING,
        sandbox_id=SandboxId("sb-" + "c" * 20),
        operation_id=OperationId("op-" + "d" * 20),
        process=Process(4321, 987_654),
        token="secret",
        generation=4,
        layers=(1, 3),
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


def test_a_journal_record_is_read_as_it_was_written(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "journal.json"
    assert journal.read(path) is None
    journal.write(path, record)
    assert journal.read(path) == record
    assert path.stat().st_mode & 0o777 == 0o600
    changed = msgspec.structs.replace(record, phase=Phase.STARTING, process=None)
    journal.write(path, changed)
    assert journal.read(path) == changed
    assert os.listdir(tmp_path) == ["journal.json"]


def test_a_crash_while_writing_leaves_the_old_record(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "journal.json"
    journal.write(path, record)
    (tmp_path / "journal.new").write_bytes(b'{"format":')
    assert journal.read(path) == record
    journal.write(path, record)
    assert journal.read(path) == record


def test_a_record_that_does_not_fit_on_the_disk_leaves_the_old_one(
    tmp_path: Path, record: Record
) -> None:
    """The kernel writes as much as there is room for, and says so; it raises nothing."""
    path = tmp_path / "journal.json"
    journal.write(path, record)
    script = (
        "import msgspec, resource, sys\n"
        "from pathlib import Path\n"
        "from wrenn_sandbox.host import journal\n"
        "path = Path(sys.argv[1])\n"
        "record = msgspec.structs.replace(journal.read(path), token='t' * 5000)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "journal.write(path, record)\n"
    )
    argv = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "File too large" in done.stderr
    assert journal.read(path) == record


@pytest.mark.root
def test_a_record_that_changes_needs_no_room_on_a_full_disk(tmp_path: Path, record: Record) -> None:
    script = (
        "import msgspec, sys\n"
        "from pathlib import Path\n"
        "from wrenn_sandbox.host import journal\n"
        "record = msgspec.json.decode(sys.argv[2], type=journal.Record)\n"
        "path = Path(sys.argv[1], 'journal.json')\n"
        "journal.write(path, msgspec.structs.replace(record, token='', process=None))\n"
        "try:\n"
        "    path.with_name('filling').write_bytes(bytes(1 << 20))\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
        "journal.write(path, record)\n"
        "print(journal.read(path) == record)\n"
    )
    small = 'mount -t tmpfs -o size=16k tmpfs "$1" && exec "$2" -c "$3" "$1" "$4"'
    encoded = msgspec.json.encode(record).decode()
    argv = ["unshare", "--mount", "sh", "-ec", small, "sh", str(tmp_path), sys.executable]
    done = subprocess.run([*argv, script, encoded], capture_output=True, text=True, check=True)
    assert done.stdout == "No space left on device\nTrue\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"\xff",
        b'{"x":' + b"[" * 100_000,
        b'{"token": "\xff"}',
        b'{"format": 2}',
        b'{"machine_id": 1}',
    ],
)
def test_a_journal_that_cannot_be_read_is_no_record(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "journal.json"
    path.write_bytes(data)
    assert journal.read(path) is None


def test_a_record_of_another_format_is_no_record(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "journal.json"
    journal.write(path, msgspec.structs.replace(record, format=journal.FORMAT + 1))
    assert journal.read(path) is None


def test_all_readable_records_are_found(tmp_path: Path, record: Record) -> None:
    for name in ("vm-a", "vm-b", "vm-empty", "vm-bad"):
        (tmp_path / name).mkdir()
    journal.write(tmp_path / "vm-a" / "journal.json", record)
    journal.write(tmp_path / "vm-b" / "journal.json", record)
    (tmp_path / "vm-bad" / "journal.json").write_bytes(b"{")
    assert journal.records(tmp_path) == [record, record]


def test_a_monitor_whose_pid_nobody_wrote_down_is_found(tmp_path: Path) -> None:
    directory = tmp_path / "vm-a"
    script = "import sys; print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", script, f"file={directory}/disk"]
    near = [sys.executable, "-c", script, f"file={directory}b/disk"]
    with (
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as one,
        subprocess.Popen(near, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other,
    ):
        for each in (one, other):
            assert each.stdout is not None
            each.stdout.readline()
        found = journal.processes_of(directory)
        one.communicate()
        other.communicate()
    assert found == [one.pid]
    assert journal.processes_of(directory) == []


def test_a_record_is_written_over_the_one_before_where_it_fits(
    tmp_path: Path, record: Record
) -> None:
    path = tmp_path / "journal.json"
    journal.write(path, record)
    file = path.stat().st_ino
    short = msgspec.structs.replace(record, token="", process=None)
    for each in (short, record):
        journal.write(path, each)
        assert journal.read(path) == each
        assert path.stat().st_ino == file
    long = msgspec.structs.replace(record, token="t" * 5000)
    for each in (long, short):
        journal.write(path, each)
        assert journal.read(path) == each
    assert os.listdir(tmp_path) == ["journal.json"]


@pytest.mark.parametrize("longer", [True, False])
def test_a_record_longer_than_a_page_is_not_written_over(
    tmp_path: Path, record: Record, longer: bool
) -> None:
    """The kernel writes page by page, and the server may be killed in between."""
    path = tmp_path / "journal.json"
    long = msgspec.structs.replace(record, token="t" * 5000)
    journal.write(path, long)
    with path.open("rb") as before:
        changed = msgspec.structs.replace(record, token="u" * (4999 if longer else 10))
        journal.write(path, changed)
        assert msgspec.json.decode(before.read(), type=Record) == long
    assert journal.read(path) == changed
