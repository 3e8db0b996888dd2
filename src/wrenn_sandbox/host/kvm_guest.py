"""Runs a tiny KVM guest and prints how long it took: `python kvm_guest.py`, two lines.

A program of its own, because a KVM that is broken may hang in the kernel: whoever starts it sets
a deadline and kills it. The guest counts a register down in real mode and halts. Writes `ready`
before it touches KVM, then as JSON `{"instructions": N, "seconds": S}` or `{"error": TEXT}`.
Numbers are from linux/kvm.h, x86-64.
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
_SET_TSS_ADDR = 0xAE47
_RUN = 0xAE80
_SET_USER_MEMORY_REGION = 0x4020AE46
_GET_SREGS = 0x8138AE83
_SET_SREGS = 0x4138AE84
_SET_REGS = 0x4090AE82
_EXIT_HLT = 5
_EXIT_REASON_OFFSET = 8
_SREGS_SIZE = 312
_TSS_ADDRESS = 0xFFFBD000
_CODE_ADDRESS = 0x1000

# mov ecx, ROUNDS; again: dec ecx; jnz again; hlt
CODE = b"\x66\xb9" + struct.pack("<I", ROUNDS) + b"\x66\x49" + b"\x75\xfc" + b"\xf4"


def run() -> float:
    """Seconds from entering the guest to its halt, the best of some runs. Raises `OSError`."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, _CREATE_VM, 0)
    _set_tss(vm)
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    memory[: len(CODE)] = CODE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    region = struct.pack("<IIQQQ", 0, 0, _CODE_ADDRESS, mmap.PAGESIZE, address)
    fcntl.ioctl(vm, _SET_USER_MEMORY_REGION, region)
    vcpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
    state = mmap.mmap(vcpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0))
    special = bytearray(_SREGS_SIZE)
    fcntl.ioctl(vcpu, _GET_SREGS, special)
    struct.pack_into("<Q", special, 0, 0)  # cs.base
    struct.pack_into("<H", special, 12, 0)  # cs.selector
    fcntl.ioctl(vcpu, _SET_SREGS, special)
    registers = [0] * 16 + [_CODE_ADDRESS, 2]  # rip, rflags
    best = math.inf
    for _ in range(RUNS):
        fcntl.ioctl(vcpu, _SET_REGS, struct.pack("<18Q", *registers))
        start = time.perf_counter()
        fcntl.ioctl(vcpu, _RUN, 0)
        best = min(best, time.perf_counter() - start)
        (reason,) = struct.unpack_from("<I", state, _EXIT_REASON_OFFSET)
        if reason != _EXIT_HLT:
            raise OSError(f"the guest left with exit reason {reason} instead of a halt")
    return best


def _set_tss(vm: int) -> None:
    """Three pages that Intel's virtual 8086 mode needs (`fcntl.ioctl` takes no such big number)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ioctl(vm, ctypes.c_ulong(_SET_TSS_ADDR), ctypes.c_ulong(_TSS_ADDRESS)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def main() -> None:
    print("ready", flush=True)
    try:
        print(json.dumps({"instructions": INSTRUCTIONS, "seconds": run()}))
    except OSError as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(1)


if __name__ == "__main__":
    main()
