"""Guests of a few instructions, which run where no Linux does: under nested KVM in software.

`WRENN_TEST_FIRECRACKER` names the Firecracker that they run in.
"""

import os
import struct
from pathlib import Path
from typing import Final

import pytest

BINARY: Final = os.environ.get("WRENN_TEST_FIRECRACKER", "")
NEEDS: Final = (
    pytest.mark.skipif(not BINARY, reason="WRENN_TEST_FIRECRACKER names no binary"),
    pytest.mark.skipif(not os.path.exists("/dev/kvm"), reason="there is no KVM"),
)
_LOAD: Final = 0x100000

COUNTING: Final = bytes.fromhex(
    "31db"  # xor ebx, ebx: the round
    "bf00004000"  # round: mov edi, 0x400000
    "b940000000"  # mov ecx, 64
    "48391f"  # page: cmp [rdi], rbx
    "7527"  # jne bad
    "488d4301"  # lea rax, [rbx + 1]
    "488907"  # mov [rdi], rax
    "4881c700100000"  # add rdi, 4096
    "ffc9"  # dec ecx
    "75e9"  # jnz page
    "48ffc3"  # inc rbx
    "66baf803"  # mov dx, 0x3f8
    "b07e"  # mov al, '~'
    "ee"  # out dx, al
    "b900100000"  # mov ecx, 0x1000
    "ffc9"  # wait: dec ecx
    "75fc"  # jnz wait
    "ebca"  # jmp round
    "66baf803"  # bad: mov dx, 0x3f8
    "b05e"  # mov al, '^'
    "ee"  # out dx, al
    "f4"  # hlt
    "ebf6"  # jmp bad
)
"""Counts in 64 pages of its memory, one after the other. On its serial port it says `~` after each
round, and `^` where a page is not as it left it."""
ENDING: Final = bytes.fromhex("0f0b")
"""ud2: without a table of what to do then the processor resets, as a Linux does that reboots."""


def kernel_of(code: bytes, path: Path) -> Path:
    """A guest of these instructions as a 64-bit ELF of one segment."""
    head = b"\x7fELF\2\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _LOAD, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    size = len(code)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0x1000, _LOAD, _LOAD, size, size, 0x1000)
    path.write_bytes((head + segment).ljust(0x1000, b"\0") + code)
    return path
