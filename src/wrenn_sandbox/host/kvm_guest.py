"""Runs a tiny KVM guest and prints how long it took: `python kvm_guest.py`, two lines.

A program of its own, because a KVM that is broken may hang in the kernel: whoever starts it sets
a deadline and kills it. The guest counts a register down: once in real mode, once as a 64-bit
program in user mode, behind page tables. Writes `ready` before it touches KVM, then as JSON
`{"instructions": N, "real_seconds": S, "user_seconds": S}` or `{"error": TEXT}`.
Numbers are from linux/kvm.h, x86-64, and AMD's Architecture Programmer's Manual, volume 2.
"""

import ctypes
import fcntl
import json
import math
import mmap
import os
import struct
import sys
import time

ROUNDS = 50_000
RUNS = 3
INSTRUCTIONS = 2 * ROUNDS + 2

_CREATE_VM = 0xAE01
_CREATE_VCPU = 0xAE41
_GET_VCPU_MMAP_SIZE = 0xAE04
_GET_SUPPORTED_CPUID = 0xC008AE05
_SET_CPUID2 = 0x4008AE90
_SET_TSS_ADDR = 0xAE47
_RUN = 0xAE80
_SET_USER_MEMORY_REGION = 0x4020AE46
_GET_SREGS = 0x8138AE83
_SET_SREGS = 0x4138AE84
_SET_REGS = 0x4090AE82
_EXIT_IO = 2
_EXIT_REASON_OFFSET = 8
_SREGS_SIZE = 312
_CPUID_ENTRIES = 256
_CPUID_SIZE = 8 + _CPUID_ENTRIES * 40
_TSS_ADDRESS = 0xFFFBD000

_CODE_ADDRESS = 0x1000
_TABLES = (0x2000, 0x3000, 0x4000)
"""Page tables of three levels: the last one maps the first 2 MiB as one page."""
_MEMORY_SIZE = 0x5000
_PRESENT_WRITABLE_USER, _LARGE = 0b111, 1 << 7
_REGISTERS = 16
_FLAGS = 0x3002  # any mode may use ports

# mov ecx, ROUNDS; again: dec ecx; jnz again; out 0x10, al
_COUNT = struct.pack("<I", ROUNDS)
REAL_CODE = b"\x66\xb9" + _COUNT + b"\x66\x49" + b"\x75\xfc" + b"\xe6\x10"
USER_CODE = b"\xb9" + _COUNT + b"\xff\xc9" + b"\x75\xfc" + b"\xe6\x10"

_SEGMENT = struct.Struct("<QIHBBBBBBBBBB")
"""base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding"""
_CS, _SS, _CONTROL = 0, 5 * _SEGMENT.size, 224
"""Where these are in the special registers: cr0, cr2, cr3, cr4, cr8, efer from the last on."""
_USER_CODE_SEGMENT = _SEGMENT.pack(0, 0xFFFFFFFF, 0x1B, 11, 1, 3, 0, 1, 1, 1, 0, 0, 0)
_USER_DATA_SEGMENT = _SEGMENT.pack(0, 0xFFFFFFFF, 0x23, 3, 1, 3, 1, 1, 0, 1, 0, 0, 0)
_PROTECTED, _EXTENSION, _PAGING = 1, 1 << 4, 1 << 31
_PAE = 1 << 5
_LONG_MODE_ENABLED, _LONG_MODE_ACTIVE = 1 << 8, 1 << 10


def run(code: bytes, *, user: bool) -> float:
    """Seconds from entering the guest to its end, the best of some runs. Raises `OSError`."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, _CREATE_VM, 0)
    _set_tss(vm)
    memory = mmap.mmap(-1, _MEMORY_SIZE)
    memory[_CODE_ADDRESS : _CODE_ADDRESS + len(code)] = code
    for table, entry in zip(_TABLES, (*_TABLES[1:], _LARGE), strict=True):
        struct.pack_into("<Q", memory, table, entry | _PRESENT_WRITABLE_USER)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    region = struct.pack("<IIQQQ", 0, 0, 0, _MEMORY_SIZE, address)
    fcntl.ioctl(vm, _SET_USER_MEMORY_REGION, region)
    vcpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
    state = mmap.mmap(vcpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0))
    _offer_all_features(kvm, vcpu)
    special = bytearray(_SREGS_SIZE)
    fcntl.ioctl(vcpu, _GET_SREGS, special)
    struct.pack_into("<Q", special, _CS, 0)  # cs.base
    struct.pack_into("<H", special, _CS + 12, 0)  # cs.selector
    if user:
        special[_CS : _CS + _SEGMENT.size] = _USER_CODE_SEGMENT
        special[_SS : _SS + _SEGMENT.size] = _USER_DATA_SEGMENT
        cr0, efer = _PROTECTED | _EXTENSION | _PAGING, _LONG_MODE_ENABLED | _LONG_MODE_ACTIVE
        struct.pack_into("<6Q", special, _CONTROL, cr0, 0, _TABLES[0], _PAE, 0, efer)
    fcntl.ioctl(vcpu, _SET_SREGS, special)
    registers = [0] * _REGISTERS + [_CODE_ADDRESS, _FLAGS]  # rip, rflags
    best = math.inf
    for _ in range(RUNS):
        fcntl.ioctl(vcpu, _SET_REGS, struct.pack("<18Q", *registers))
        start = time.perf_counter()
        fcntl.ioctl(vcpu, _RUN, 0)
        best = min(best, time.perf_counter() - start)
        (reason,) = struct.unpack_from("<I", state, _EXIT_REASON_OFFSET)
        if reason != _EXIT_IO:
            raise OSError(f"the guest left with exit reason {reason} instead of its last word")
    return best


def _offer_all_features(kvm: int, vcpu: int) -> None:
    """Those that KVM can give: some kernels refuse 64-bit registers of a processor without."""
    features = bytearray(_CPUID_SIZE)
    struct.pack_into("<I", features, 0, _CPUID_ENTRIES)
    fcntl.ioctl(kvm, _GET_SUPPORTED_CPUID, features)
    fcntl.ioctl(vcpu, _SET_CPUID2, features)


def _set_tss(vm: int) -> None:
    """Three pages that Intel's virtual 8086 mode needs (`fcntl.ioctl` takes no such big number)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ioctl(vm, ctypes.c_ulong(_SET_TSS_ADDR), ctypes.c_ulong(_TSS_ADDRESS)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def main() -> None:
    print("ready", flush=True)
    try:
        real, user = run(REAL_CODE, user=False), run(USER_CODE, user=True)
        print(
            json.dumps({"instructions": INSTRUCTIONS, "real_seconds": real, "user_seconds": user})
        )
    except OSError as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(1)


if __name__ == "__main__":
    main()
