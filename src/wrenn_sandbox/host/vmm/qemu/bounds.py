"""How much of this host one machine's process may take."""

from typing import Final

from wrenn_sandbox.host.privileged.cgroups import Bounds
from wrenn_sandbox.host.privileged.limits import Limits
from wrenn_sandbox.host.vmm.base import MachineSpec

from .command import TRANSLATION_CACHE_MB

_MB: Final = 1 << 20
_THREADS: Final = 256
"""Processors of the guest, and up to 64 that wait for files at once; the rest is room."""
_BUSY_THREADS: Final = 72
_THREAD_MB: Final = 72
"""Addresses of one thread: a stack of 8 MB, and where there are processors for it a heap of 64."""
_ADDRESSES_MB: Final = 2048
"""Libraries and tables; measured with 8 processors, 4 GB and many files at once: 3 GB in all."""
_OWN_MB: Final = 256
_OWN_MB_PER_CPU: Final = 16
"""What the process itself comes to use of that, and pages of files in the host's cache."""
_OWN_CPUS: Final = 1.0
_HOLES: Final = 2
"""Where a guest has given space back the layer has holes, and large writes go behind its end: its
length passes the disk's size then, though not what it takes. Were that too little, a guest would
see errors of its disk."""
_METADATA_MB: Final = 64


def limits(spec: MachineSpec, *, own_user: bool) -> Limits:
    """For the process alone; `own_user` says that nothing else runs as its user."""
    disk = spec.disk_mb * _MB
    layer = _HOLES * disk + _METADATA_MB * _MB
    memory = spec.memory_mb * _MB
    own = _ADDRESSES_MB + TRANSLATION_CACHE_MB + (_BUSY_THREADS + spec.vcpus) * _THREAD_MB
    return Limits(
        file_size=max(layer, memory + _METADATA_MB * _MB),
        address_space=memory + own * _MB,
        threads=_THREADS if own_user else None,
    )


def bounds(spec: MachineSpec) -> Bounds:
    """For its control group."""
    own = TRANSLATION_CACHE_MB + _OWN_MB + spec.vcpus * _OWN_MB_PER_CPU
    return Bounds(
        memory=(spec.memory_mb + own) * _MB,
        cpus=spec.vcpus + _OWN_CPUS,
        threads=_THREADS,
    )
