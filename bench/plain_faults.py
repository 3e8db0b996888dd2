"""`python -I -S plain_faults.py LISTENER`: page faults answered by UFFDIO_COPY and nothing else.

What no page server in this language can beat: each fault gets a copy of the same page. Nothing is
looked up, and nothing that the other side says is checked.
"""

import _ctypes
import _socket
import fcntl
import mmap
import posix
import struct
import sys

COPY = 0xC028AA03


class _Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


def main() -> None:
    fd, _ = _socket.socket(fileno=int(sys.argv[1]))._accept()  # type: ignore[attr-defined]
    _, ancillary, _, _ = _socket.socket(fileno=fd).recvmsg(1 << 16, _socket.CMSG_LEN(4))
    (uffd,) = struct.unpack("=i", ancillary[0][2])
    posix.set_blocking(uffd, True)
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
    page[:] = b"x" * mmap.PAGESIZE
    source = _ctypes.addressof(_Byte.from_buffer(page))
    event, copy, argument = struct.Struct("=B7xQQ8x"), struct.Struct("=QQQQq"), bytearray(40)
    while True:
        for _, _, address in event.iter_unpack(posix.read(uffd, 32 * 64)):
            copy.pack_into(argument, 0, address & -mmap.PAGESIZE, source, mmap.PAGESIZE, 0, 0)
            fcntl.ioctl(uffd, COPY, argument)


if __name__ == "__main__":
    main()
