"""What is stored with one driver is nothing for another."""

from pathlib import Path

import pytest

from support.host_context import make_context
from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host import compatibility
from wrenn_sandbox.host.images.manifest import HardwareProfile


def _profile(vmm: str) -> HardwareProfile:
    return HardwareProfile(
        vcpus=1,
        memory_mb=512,
        cpu_model="none",
        accelerator="none",
        vmm=vmm,
        vmm_version="1",
        network="user",
    )


@pytest.mark.parametrize(("vmm", "title"), [("qemu", "QEMU"), ("firecracker", "Firecracker")])
def test_what_another_driver_has_stored_names_the_setting(
    tmp_path: Path, vmm: str, title: str
) -> None:
    context = make_context(tmp_path)
    here = _profile(context.driver.capabilities.name)
    compatibility.require_driver(context, here)
    with pytest.raises(IncompatibleImage) as caught:
        compatibility.require(context, _profile(vmm), here)
    assert str(caught.value) == (
        f"It was stored with {title}, and this host runs fake; start the server with"
        f" WRENN_DRIVER={vmm}"
    )
