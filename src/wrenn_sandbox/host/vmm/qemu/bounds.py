"""How much of this host one machine's process may take."""

from typing import Final

from wrenn_sandbox.host.privileged.cgroups import Bounds
from wrenn_sandbox.host.privileged.limits import Limits
from wrenn_sandbox.host.vmm.base import MachineSpec

from .command import TRANSLATION_CACHE_MB

_MB: Final = 1 << 20
_THREADS: Final = 256
"""Processors of the guest, and up to 64 that wait for files at once; the rest is room."""
_ADDRESSES_MB: Final = 4096
"""Beside the guest's memory: libraries, stacks of 8 MB and heaps of 128 MB for many threads."""
_OWN_MB: Final = 256
"""What the process itself comes to use of that, and pages of files in the host's cache."""
_OWN_CPUS: Final = 1.0
_METADATA_SHARE: Final = 512
_METADATA_MB: Final = 64
"""Tables of a disk layer are one part in 6500 of it; the rest is room for free clusters."""


def limits(spec: MachineSpec, *, own_user: bool) -> Limits:
    """For the process alone; `own_user` says that nothing else runs as its user."""
    disk = spec.disk_mb * _MB
    layer = disk + disk // _METADATA_SHARE + _METADATA_MB * _MB
    memory = spec.memory_mb * _MB
    return Limits(
        file_size=max(layer, memory + _METADATA_MB * _MB),
        address_space=memory + (TRANSLATION_CACHE_MB + _ADDRESSES_MB) * _MB,
        threads=_THREADS if own_user else None,
    )


def bounds(spec: MachineSpec) -> Bounds:
    """For its control group."""
    return Bounds(
        memory=(spec.memory_mb + TRANSLATION_CACHE_MB + _OWN_MB) * _MB,
        cpus=spec.vcpus + _OWN_CPUS,
        threads=_THREADS,
    )
