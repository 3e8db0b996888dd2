"""The program in a kernel, however it is compressed."""

import ctypes
import gzip
import lzma
import os
import struct

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.vmm.firecracker.kernel import unpack

_ELF = b"\x7fELF" + os.urandom(100_000) + bytes(9 << 20)


def _lz4(data: bytes) -> bytes:
    library = ctypes.CDLL("liblz4.so.1")
    found = b"\x02\x21\x4c\x18"
    for start in range(0, len(data), 8 << 20):
        piece = data[start : start + (8 << 20)]
        room = library.LZ4_compressBound(len(piece))
        target = ctypes.create_string_buffer(room)
        size = library.LZ4_compress_default(piece, target, len(piece), room)
        found += struct.pack("<I", size) + target.raw[:size]
    return found


def _xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=1)


def _kernel(payload: bytes) -> bytes:
    """A bzImage of two sectors of start-up code, with something before the payload."""
    head = bytearray(3 * 512)
    head[0x1F1] = 2
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 7, len(payload))
    return bytes(head) + b"before:" + payload + b"behind"


@pytest.mark.parametrize("compress", [gzip.compress, _xz, _lz4])
def test_the_program_of_a_kernel_is_unpacked(compress: object) -> None:
    assert callable(compress)
    length = struct.pack("<I", len(_ELF))
    assert unpack(_kernel(compress(_ELF) + length)) == _ELF


def test_a_kernel_that_is_a_program_already_is_left_as_it_is() -> None:
    assert unpack(_ELF) is _ELF


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "no Linux kernel"),
        (bytes(4096), "no Linux kernel"),
        (_kernel(b"BZh9"), "unknown way"),
        (_kernel(b""), "unknown way"),
        (_kernel(gzip.compress(b"text") + bytes(4)), "no ELF file"),
        (_kernel(gzip.compress(_ELF)[:-100]), "it ends early"),
        (_kernel(b"\x1f\x8bxxxxxxxxxx"), ""),
        (_kernel(b"\xfd7zXZ\0xxxxxxxxxxxxxx"), ""),
        (_kernel(b"\x02\x21\x4c\x18" + struct.pack("<I", 1000) + bytes(10)), "is damaged"),
        (_kernel(b"\x02\x21\x4c\x18" + struct.pack("<I", 6) + b"\xff" * 10), "is damaged"),
    ],
)
def test_what_holds_no_program_is_refused(image: bytes, reason: str) -> None:
    with pytest.raises(HostFailure, match="cannot be unpacked") as caught:
        unpack(image)
    assert reason in (caught.value.detail or "")
