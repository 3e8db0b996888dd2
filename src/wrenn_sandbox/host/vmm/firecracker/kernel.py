"""The program in a compressed Linux kernel: Firecracker starts no other form. Blocks.

Images keep the kernel as its package has it, which is what QEMU starts. It is unpacked at each
boot: boots are rare, and a tenth of a second is less than a cache of files of 50 MB is worth.
(Kernel: Documentation/arch/x86/boot.rst. LZ4: the legacy frame of its lz4_Frame_format.md.)
"""

import ctypes
import lzma
import struct
import zlib
from typing import Final

from wrenn_sandbox.errors import HostFailure

_HEADER_AT, _SECTORS_AT, _PAYLOAD_AT = 0x202, 0x1F1, 0x248
_MAGIC: Final = b"HdrS"
_SECTOR: Final = 512
_ELF: Final = b"\x7fELF"
_LZ4: Final = b"\x02\x21\x4c\x18"
_LZ4_BLOCK: Final = 8 << 20
_LZ4_LIBRARY: Final = "liblz4.so.1"
_GZIP: Final = 31
"""What zlib calls the form of gzip."""
_LIMIT: Final = 512 << 20
_CANNOT: Final = "The guest's kernel cannot be unpacked for Firecracker"


def unpack(image: bytes) -> bytes:
    """The ELF file in a bzImage, or the image itself if it is one; raises `HostFailure`."""
    if image.startswith(_ELF):
        return image
    if image[_HEADER_AT : _HEADER_AT + 4] != _MAGIC:
        raise HostFailure(_CANNOT, detail="it is no Linux kernel")
    offset, length = struct.unpack_from("<II", image, _PAYLOAD_AT)
    start = (image[_SECTORS_AT] + 1) * _SECTOR + offset
    payload = image[start : start + length]
    try:
        found = _decompressed(payload)
    except (OSError, ValueError, lzma.LZMAError, zlib.error, struct.error) as error:
        raise HostFailure(_CANNOT, detail=str(error)) from error
    if not found.startswith(_ELF):
        raise HostFailure(_CANNOT, detail="there is no ELF file in it")
    return found


def _decompressed(payload: bytes) -> bytes:
    """Behind the stream is its length, which the formats need not be told."""
    if payload.startswith(_LZ4):
        return _lz4(payload)
    if payload.startswith(b"\xfd7zXZ\0"):
        xz = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        found, whole = xz.decompress(payload, _LIMIT), xz.eof
    elif payload.startswith(b"\x1f\x8b"):
        gzip = zlib.decompressobj(_GZIP)
        found, whole = gzip.decompress(payload, _LIMIT), gzip.eof
    else:
        known = "known are gzip, xz and LZ4"
        raise ValueError(f"compressed in an unknown way ({payload[:4].hex()}); {known}")
    if not whole:
        raise ValueError("it ends early")
    return found


def _lz4(payload: bytes) -> bytes:
    """A legacy frame: blocks of 8 MiB, each behind its compressed length."""
    library = ctypes.CDLL(_LZ4_LIBRARY)
    end = len(payload) - 4
    found, at = bytearray(), len(_LZ4)
    block = ctypes.create_string_buffer(_LZ4_BLOCK)
    while at < end:
        (length,) = struct.unpack_from("<I", payload, at)
        piece = payload[at + 4 : min(at + 4 + length, end)]
        size = library.LZ4_decompress_safe(piece, block, len(piece), _LZ4_BLOCK)
        if size < 0 or len(piece) != length or len(found) + size > _LIMIT:
            raise ValueError(f"an LZ4 block of {length} bytes is damaged")
        found += memoryview(block)[:size]
        at += 4 + length
    return bytes(found)
