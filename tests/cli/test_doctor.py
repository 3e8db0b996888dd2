"""What `wrenn doctor` says of machines, and of this one."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from wrenn_sandbox.cli import doctor
from wrenn_sandbox.cli.doctor import Line, examine, healthy
from wrenn_sandbox.cli.main import app
from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.host.facts import MachineFacts
from wrenn_sandbox.host.probe import KvmVerdict
from wrenn_sandbox.settings import Settings

GOOD = MachineFacts(
    root=True,
    kernel="6.12.1",
    cpu_model="Some CPU",
    cpus=8,
    memory_mb=16_000,
    memory_available_mb=12_000,
    disk_free_mb=100_000,
    tun=True,
    netns=True,
    nft=True,
    connection_limits=True,
    bandwidth_limits=True,
    cgroup_v2=True,
    cgroup_controllers=("memory", "cpu", "pids"),
    jail_obstacle="",
    sealed_memory=True,
    qemu_path=Path("/usr/bin/qemu-system-x86_64"),
    qemu_version="10.0.2",
    qemu_seccomp=True,
    firecracker="/usr/local/bin/firecracker 1.14.4 (SHA-256 0123456789ab)",
    firecracker_obstacle="",
    shares_blocks=True,
    cpu_vendor="AuthenticAMD",
    cpu_models={"kvm": ("EPYC-v1", "Nehalem-v1"), "tcg": ("Nehalem-v1",)},
    tools={"ip": Path("/usr/sbin/ip"), "nft": Path("/usr/sbin/nft")},
    image_tools={"skopeo": Path("/usr/bin/skopeo"), "umoci": Path("/usr/bin/umoci")},
    forwarding=True,
    forward_dropped=False,
)
KVM = KvmVerdict(usable=True, reason="a tiny guest ran")
SETTINGS = Settings(data_dir=Path("/tmp/doctor"))


def line(name: str, facts: MachineFacts, kvm: KvmVerdict = KVM, **settings: object) -> Line:
    lines = examine(facts, kvm, SETTINGS.model_copy(update=settings))
    return next(each for each in lines if each.name == name)


@pytest.mark.parametrize(
    ("settings", "kvm", "why"),
    [
        ({}, KvmVerdict(usable=False, reason="none"), "KVM is not usable: none"),
        ({"accelerator": "tcg"}, KVM, "it needs KVM, and WRENN_ACCELERATOR is tcg"),
        ({"cpu_model": "EPYC-v1"}, KVM, "WRENN_CPU_MODEL names another"),
        ({"network": "user"}, KVM, "it needs network slots with taps; see `wrenn doctor`"),
    ],
)
def test_doctor_says_what_firecracker_lacks(
    settings: dict[str, object], kvm: KvmVerdict, why: str
) -> None:
    found = line("firecracker", GOOD, kvm, driver="firecracker", **settings)
    assert (found.status, found.detail.endswith(why)) == ("missing", True)
    found = line("firecracker", GOOD, kvm, driver="auto", **settings)
    assert (found.status, found.detail.endswith(f"{why}; machines run in QEMU")) == ("ok", True)


def test_doctor_finds_nothing_wrong_with_a_good_machine() -> None:
    lines = examine(GOOD, KVM, SETTINGS)
    assert {each.status for each in lines} == {"ok"}
    assert not any(each.advice for each in lines)
    assert healthy(lines)
    assert {each.name for each in lines} >= {
        "kvm", "qemu", "firecracker", "disk copies",
        "cpu", "tun", "namespaces", "nftables", "connections", "bandwidth",
        "forwarding",
        "users", "slots", "jail", "seccomp", "memory images",
        "cgroup memory", "cgroup cpu", "cgroup pids", "disk", "memory", "kernel",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "facts", "status"),
    [
        ("qemu", replace(GOOD, qemu_path=None), "missing"),
        ("qemu", replace(GOOD, qemu_version=""), "missing"),
        ("firecracker", replace(GOOD, firecracker=""), "ok"),
        ("firecracker", replace(GOOD, firecracker="", firecracker_obstacle="old"), "warn"),
        ("disk copies", replace(GOOD, shares_blocks=False), "warn"),
        ("tools", replace(GOOD, tools={"mmdebstrap": None}), "warn"),
        ("image tools", replace(GOOD, image_tools={"skopeo": None}), "ok"),
        ("disk", replace(GOOD, disk_free_mb=100), "missing"),
        ("memory", replace(GOOD, memory_available_mb=900), "missing"),
        ("root", replace(GOOD, root=False), "warn"),
        ("tun", replace(GOOD, tun=False), "warn"),
        ("namespaces", replace(GOOD, netns=False), "warn"),
        ("nftables", replace(GOOD, nft=False), "warn"),
        ("connections", replace(GOOD, connection_limits=False), "missing"),
        ("bandwidth", replace(GOOD, bandwidth_limits=False), "warn"),
        ("forwarding", replace(GOOD, nft=False), "warn"),
        ("forwarding", replace(GOOD, forward_dropped=True), "warn"),
        ("forwarding", replace(GOOD, forwarding=False), "ok"),
        ("users", replace(GOOD, root=False), "warn"),
        ("slots", replace(GOOD, tun=False), "warn"),
        ("slots", replace(GOOD, nft=False), "warn"),
        ("jail", replace(GOOD, jail_obstacle="mount /: Operation not permitted"), "warn"),
        ("seccomp", replace(GOOD, qemu_seccomp=False), "warn"),
        ("memory images", replace(GOOD, qemu_version="8.1.9"), "ok"),
        ("memory images", replace(GOOD, sealed_memory=False), "ok"),
        ("memory images", replace(GOOD, qemu_version="8.1.9", sealed_memory=False), "missing"),
        ("cgroup memory", replace(GOOD, cgroup_controllers=("cpu", "pids")), "warn"),
        ("cgroup cpu", replace(GOOD, cgroup_controllers=("memory", "pids")), "warn"),
        ("cgroup pids", replace(GOOD, cgroup_controllers=("memory", "cpu")), "warn"),
        ("cgroup pids", replace(GOOD, cgroup_v2=False, cgroup_controllers=()), "warn"),
    ],
)
def test_a_lack_has_a_status_and_advice(name: str, facts: MachineFacts, status: str) -> None:
    found = line(name, facts)
    assert found.status == status
    assert bool(found.advice) == (status != "ok")
    assert healthy(examine(facts, KVM, SETTINGS)) == (status != "missing")


def test_user_mode_networking_is_the_network_of_the_host() -> None:
    assert line("slots", GOOD).status == "ok"
    assert line("slots", GOOD, network="user").status == "warn"


def test_limits_that_are_set_must_be_possible() -> None:
    facts = replace(GOOD, connection_limits=False, bandwidth_limits=False)
    assert line("bandwidth", facts, guest_mbit_per_sec=10).status == "missing"
    found = line("connections", facts, guest_connections=0, guest_connections_per_sec=0)
    assert found.status == "warn"


def test_the_obstacle_is_named() -> None:
    found = line("jail", replace(GOOD, jail_obstacle="mount /: Operation not permitted"))
    assert "mount /: Operation not permitted" in found.detail
    found = line("cgroup cpu", replace(GOOD, cgroup_v2=False, cgroup_controllers=()))
    assert "not mounted" in found.detail


def test_without_kvm_machines_run_in_software() -> None:
    found = line("kvm", GOOD, KvmVerdict(usable=False, reason="there is no /dev/kvm"))
    assert found.status == "warn"
    assert "there is no /dev/kvm" in found.detail
    assert "TCG" in found.detail


@pytest.mark.parametrize("name", ["root", "tun", "namespaces", "nftables"])
def test_taps_that_are_asked_for_must_be_possible(name: str) -> None:
    facts = replace(GOOD, root=False, tun=False, netns=False, nft=False)
    assert line(name, facts, network="tap").status == "missing"


def _doctor(*options: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *options])


@pytest.fixture
def data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WRENN_DATA_DIR", str(tmp_path))


@pytest.mark.usefixtures("data_dir")
def test_the_command_prints_a_line_for_each() -> None:
    result = _doctor()
    assert result.exit_code == 0, result.output
    words = [text.split()[0] for text in result.output.splitlines()]
    assert set(words) <= {"ok", "warn", "->"}
    assert words.count("->") == words.count("warn")


@pytest.mark.usefixtures("data_dir")
def test_the_command_speaks_json() -> None:
    result = _doctor("--json")
    assert result.exit_code == 0
    lines = msgspec.json.decode(result.output, type=list[Line])
    assert set(msgspec.json.decode(result.output)[0]) == {"name", "status", "detail", "advice"}
    assert len(lines) >= 12


@pytest.mark.usefixtures("data_dir")
def test_the_command_fails_where_sandboxes_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def facts(*_: Path | None) -> MachineFacts:
        return replace(GOOD, qemu_path=None)

    monkeypatch.setattr(doctor, "machine_facts", facts)
    result = _doctor()
    assert result.exit_code == 1
    assert "install the package qemu-system-x86" in result.output


@pytest.mark.parametrize(
    ("wanted", "accelerator", "status", "said"),
    [
        ("auto", "auto", "ok", "guests get host under kvm; of 2 named models EPYC-v1 has most"),
        ("host", "auto", "ok", "guests get host under kvm"),
        ("EPYC-v1", "auto", "ok", "guests get EPYC-v1 under kvm"),
        ("EPYC-v1", "tcg", "missing", "this host cannot give guests a EPYC-v1 under tcg"),
        ("auto", "tcg", "ok", "guests get max under tcg"),
        ("host", "tcg", "missing", "this host cannot give guests a host under tcg"),
    ],
)
def test_doctor_says_which_processor_guests_get(
    wanted: str, accelerator: str, status: str, said: str
) -> None:
    found = line("cpu", GOOD, cpu_model=wanted, accelerator=accelerator)
    assert (found.status, found.detail[: len(said)]) == (status, said)
    assert ("WRENN_CPU_MODEL to auto or one of Nehalem-v1" in found.advice) == (status != "ok")


def _report(path: Path, facts: MachineFacts, kvm: KvmVerdict = KVM) -> str:
    path.write_bytes(msgspec.json.encode(examine(facts, kvm, SETTINGS)))
    return str(path)


def test_doctor_names_the_best_model_that_hosts_have_in_common(tmp_path: Path) -> None:
    more = replace(GOOD, cpu_models={"kvm": ("EPYC-Rome-v1", "EPYC-v1", "Nehalem-v1")})
    less = replace(GOOD, cpu_models={"kvm": ("Nehalem-v1",)})
    reports = [_report(tmp_path / "1", more), _report(tmp_path / "2", GOOD)]
    result = _doctor(*reports)
    assert (result.exit_code, result.output.splitlines()) == (
        0,
        ["WRENN_CPU_MODEL=EPYC-v1", "in common, the best first: EPYC-v1, Nehalem-v1"],
    )
    assert "WRENN_CPU_MODEL=Nehalem-v1\n" in _doctor(*reports, _report(tmp_path / "3", less)).output


def test_doctor_finds_nothing_in_common_where_there_is_nothing(tmp_path: Path) -> None:
    first = _report(tmp_path / "1", GOOD)
    others = (
        _report(tmp_path / "2", replace(GOOD, cpu_vendor="GenuineIntel")),
        _report(tmp_path / "3", GOOD, KvmVerdict(usable=False, reason="no")),
        _report(tmp_path / "4", replace(GOOD, cpu_models={"kvm": ("486-v1",)})),
    )
    for other in others:
        result = _doctor(first, other)
        assert result.exit_code == 1
        assert "no CPU model in common" in result.output


def test_doctor_refuses_what_is_no_report(tmp_path: Path) -> None:
    for content in (b"", b"[]", b"{}"):
        (tmp_path / "report").write_bytes(content)
        result = _doctor(str(tmp_path / "report"))
        assert isinstance(result.exception, InvalidRequest)
        assert "is no report of `wrenn doctor --json`" in str(result.exception)
