"""The drivers that a host can have, and which one it takes."""

from pathlib import Path
from typing import get_args

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host import backends
from wrenn_sandbox.host.backends import BACKENDS, Backends
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.probe import KvmVerdict
from wrenn_sandbox.settings import HostSettings


def test_the_setting_takes_the_name_of_each_driver() -> None:
    assert set(get_args(HostSettings.model_fields["driver"].annotation)) == {"auto", *BACKENDS}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostSettings:
    """Of a host with KVM, taps and a Firecracker."""

    async def works(_: Path) -> KvmVerdict:
        return KvmVerdict(usable=True, reason="")

    monkeypatch.setattr(backends, "kvm_verdict", works)
    monkeypatch.setattr(backends, "choose_network", lambda _: "tap")
    monkeypatch.setattr(backends, "require_usable", lambda _: "1.14.4")
    binary = tmp_path / "firecracker"
    binary.touch()
    return HostSettings(data_dir=tmp_path, driver="auto", accelerator="auto", firecracker=binary)


async def _choice(settings: HostSettings, **changes: object) -> str:
    changed = settings.model_copy(update=changes)
    return await backends._chosen(changed, Paths(changed.data_dir))


async def test_a_host_takes_firecracker_where_it_is_and_runs(settings: HostSettings) -> None:
    assert await _choice(settings) == "firecracker"
    assert await _choice(settings, cpu_model="host") == "firecracker"
    assert await _choice(settings, driver="qemu") == "qemu"
    assert await _choice(settings, firecracker=settings.data_dir / "missing") == "qemu"


@pytest.mark.parametrize("changes", [{"accelerator": "tcg"}, {"cpu_model": "EPYC-v1"}])
async def test_a_host_takes_qemu_where_only_that_does_what_is_asked(
    settings: HostSettings, changes: dict[str, object]
) -> None:
    assert await _choice(settings, **changes) == "qemu"


async def test_a_firecracker_that_cannot_be_used_is_no_choice(
    settings: HostSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> str:
        raise HostFailure("Firecracker 1.2.3 is too old; 1.13 or later is needed")

    monkeypatch.setattr(backends, "require_usable", refuse)
    assert await _choice(settings) == "qemu"
    monkeypatch.setattr(backends, "choose_network", lambda _: "user")
    assert await _choice(settings) == "qemu"


async def test_firecracker_says_what_it_lacks(
    settings: HostSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings.model_copy(update={"driver": "firecracker"})
    with pytest.raises(HostFailure, match="WRENN_ACCELERATOR is tcg"):
        await Backends.of(asked.model_copy(update={"accelerator": "tcg"}), Paths(asked.data_dir))

    async def broken(_: Path) -> KvmVerdict:
        return KvmVerdict(usable=False, reason="there is no /dev/kvm")

    monkeypatch.setattr(backends, "kvm_verdict", broken)
    paths = Paths(asked.data_dir)
    paths.prepare()
    with pytest.raises(HostFailure, match="KVM is not usable: there is no /dev/kvm"):
        await Backends.of(asked, paths)
