"""Opening the tap of a slot."""

import fcntl
import os
import socket
import struct
from functools import partial
from pathlib import Path

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.slot import Slot

from .netns import NamespaceThread

TUN_DEVICE = Path("/dev/net/tun")
# linux/if_tun.h, linux/sockios.h, linux/if.h
_TUNSETIFF = 0x400454CA
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x0001
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000


async def open_tap(namespaces: NamespaceThread, slot: Slot) -> int:
    """A descriptor of the slot's tap; see `attach_tap`. The caller closes it."""
    if slot.tap is None:
        raise HostFailure("This slot has no tap")
    return await namespaces.run(slot.netns, partial(attach_tap, slot.tap))


def attach_tap(name: str) -> int:
    """A non-blocking descriptor of an existing tap of the calling thread's namespace, now up.

    The tap is brought up after it is attached: then it carries packets when this returns, while one
    that was up before would drop them until the kernel gets to it.

    Frames carry a virtio-net header of 10 bytes. The descriptor is closed on exec: hand it to a VMM
    with `pass_fds`. Raises `HostFailure`, also while another descriptor is attached.
    """
    try:
        fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise HostFailure("Cannot open the tun device", detail=str(error)) from error
    try:
        request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
        fcntl.ioctl(fd, _TUNSETIFF, request)
        bring_up(name)
    except OSError as error:
        os.close(fd)
        raise HostFailure("Cannot attach to the tap of the slot", detail=str(error)) from error
    return fd


def bring_up(name: str) -> None:
    """Let a tap of the calling thread's namespace carry packets; raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0))
        _, flags = struct.unpack_from("16sH", answer)
        request = struct.pack("16sH22x", name.encode(), flags | _IFF_UP)
        fcntl.ioctl(control, _SIOCSIFFLAGS, request)
