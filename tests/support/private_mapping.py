"""A process that maps a file privately, as a machine's monitor does, and writes where it is told.

python private_mapping.py FILE      commands on standard input, an answer line for each:
fill FIRST COUNT BYTE               write pages
look FIRST COUNT                    digest of pages
"""

import ctypes
import hashlib
import mmap
import os
import sys

PAGE = mmap.PAGESIZE


def main() -> None:
    fd = os.open(sys.argv[1], os.O_RDWR)
    memory = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    print(address, flush=True)
    for line in sys.stdin:
        verb, first, count, *rest = line.split()
        start, size = int(first) * PAGE, int(count) * PAGE
        if verb == "fill":
            memory[start : start + size] = bytes([int(rest[0])]) * size
            print("done", flush=True)
        else:
            print(hashlib.sha256(memory[start : start + size]).hexdigest(), flush=True)


if __name__ == "__main__":
    main()
