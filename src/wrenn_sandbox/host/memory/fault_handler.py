"""The program that answers a machine's page faults: a process of its own for each machine.

    fault_handler SOCKET AROUND LISTENER CONTROL BASE INDEX DIFF WORKING_SET

`PageServer` starts it. SOCKET is there for a later server to tell whose it is, AROUND the pages
that a fault brings, and the rest are descriptors, the last three maybe -1 for none. So it needs no
file of this host. It stands alone and imports only what costs the interpreter next to nothing:
that halves the time of its start and saves a third of its memory.

It takes one connection of the VMM, which brings a userfaultfd and says where guest memory is, as
Firecracker does. (Kernel: Documentation/admin-guide/mm/userfaultfd.rst, linux/userfaultfd.h.) A
page comes from the diff where that has it, else from the base, and the kernel copies it out of the
mapped file. A page that holds zeros becomes the kernel's zero page.

A page counts as given once the kernel says that it is there. One that was given and is missing
again was removed by the VMM, whether that said so or not, and is zero from then on.

What the VMM says is bounded and checked. What cannot be served ends the process, with a last word
to the server, which ends the machine. A VMM holds the userfaultfd open itself: it waits until
then, and never sees zeros in the place of a page.
"""

import _ctypes
import _json
import _operator
import _socket
import _thread
import array
import bisect
import errno
import fcntl
import itertools
import mmap
import posix
import select
import struct
import sys
import time

PAGE = mmap.PAGESIZE
_MAP_NORESERVE = 0x4000

COPY = 0xC028AA03
ZEROPAGE = 0xC020AA04
WAKE = 0x8010AA02
_COPY = struct.Struct("=QQQQq")
_ZEROPAGE = struct.Struct("=QQQq")
_RANGE = struct.Struct("=QQ")
_COPIED = struct.Struct("=32xq")
_ZEROED = struct.Struct("=24xq")
_EVENT = struct.Struct("=B7xQQ8x")
_PAGE_FAULT, _FORK, _REMOVE = 0x12, 0x13, 0x15
_MISSING_ONLY = ~1
"""Of the flags of a fault: all but that it was a write."""
_EVENTS_AT_ONCE = 64
_USERFAULTFD = "anon_inode:[userfaultfd]"

_UNTOUCHED, _GIVEN, _REMOVED = b"\0", b"\1", b"\2"
_CHUNK = 256
"""Pages that are copied at once: more make it no faster and let faults wait."""
_ZEROS = bytes(PAGE)
_PAUSE_SEC = 50e-6
_LATER_SEC = 20e-6

_HANDSHAKE_LIMIT = 64 * 1024
_REGIONS = 64
_ADDRESSES = 1 << 56

_HEAD = struct.Struct("<4sIIII")
INDEX_MAGIC, INDEX_VERSION = b"WRMI", 1
SET_MAGIC, SET_VERSION = b"WRWS", 1
SET_RUNS = 16_384
SET_PAGES = 65_536
SET_LIMIT = _HEAD.size + 8 * SET_RUNS
"""Bytes of the longest working set."""

MACHINE, STOP = b"machine", b"stop"
"""What the server says: which process the machine is (its pidfd), and to end the recording."""
SERVING, FAILED = b"serving ", b"failed: "
"""What it hears, besides a working set. With `SERVING` come the regions, each as its first page,
the one behind it and its address in the machine's process."""


def index_limit(pages: int) -> int:
    """Bytes of the longest index of a guest of that many pages."""
    return _HEAD.size + 8 * pages


class UnknownFormat(ValueError):
    """The file is of another kind, or of another version."""


def encode_runs(magic: bytes, version: int, numbers: "array.array[int]", pages: int) -> bytes:
    """Runs of pages as a file, from their first pages and lengths in turn.

    Magic, version, page size, the guest's memory in pages, the count of runs, then for each run
    its first page and its length: all little-endian, 32 bit but for the magic.
    """
    if sys.byteorder != "little":
        numbers = numbers[:]
        numbers.byteswap()
    return _HEAD.pack(magic, version, PAGE, pages, len(numbers) // 2) + numbers.tobytes()


def decode_runs(data: bytes, magic: bytes, version: int, pages: int) -> "array.array[int]":
    """The other way round. The runs are in order, apart and within the guest's memory.

    Raises `UnknownFormat`, and ValueError for what is damaged or does not fit the guest.
    """
    if len(data) < _HEAD.size:
        raise ValueError("index too short")
    found, found_version, page, stored_pages, count = _HEAD.unpack_from(data)
    if found != magic or found_version != version or page != PAGE:
        raise UnknownFormat(f"magic {found!r} version {found_version} page {page}")
    if stored_pages != pages or len(data) != _HEAD.size + 8 * count:
        raise ValueError("index does not fit the guest")
    numbers = array.array("I", data[_HEAD.size :])
    if sys.byteorder != "little":
        numbers.byteswap()
    firsts, counts = numbers[::2], numbers[1::2]
    ends = array.array("Q", map(_operator.add, firsts, counts))
    if count and not (
        all(counts) and ends[-1] <= pages and all(map(_operator.le, ends, firsts[1:]))
    ):
        raise ValueError("runs out of place")
    return numbers


def decode_set(data: bytes, pages: int) -> "array.array[int]":
    """The runs of a working set: first pages and lengths in turn; raises ValueError."""
    if len(data) > SET_LIMIT:
        raise ValueError("working set too long")
    numbers = decode_runs(data, SET_MAGIC, SET_VERSION, pages)
    if sum(numbers[1::2]) > SET_PAGES:
        raise ValueError("working set too large")
    return numbers


Region = tuple[int, int, int]
"""A piece of guest memory: its first page, that behind it, and its address less its place."""


class Refused(Exception):
    """Something that cannot be served; the message is for the server's log."""


class _Scanner:
    """What the interpreter's own reader of JSON asks for. Importing `json` would double the start;
    where that is not imported the reader has a SystemError for some texts."""

    strict = True
    object_hook = object_pairs_hook = parse_constant = None
    parse_float, parse_int = float, int
    memo: dict[str, str] = {}  # noqa: RUF012


def parse_regions(text: str, pages: int) -> list[Region]:
    """The regions of a handshake, by address: `[{"base_host_virt_addr", "size", "offset",
    "page_size"}, ...]`, all in bytes. Raises `Refused`.

    Together they are all of the guest's memory. Versions before 1.13 say `page_size_kib` alone,
    and mean bytes.
    """
    try:
        found, end = _json.make_scanner(_Scanner)(text, 0)  # type: ignore[arg-type]
    except (StopIteration, ValueError, RecursionError, SystemError) as error:
        raise Refused("the handshake is not JSON") from error
    if text[end:].strip() or not isinstance(found, list) or not 0 < len(found) <= _REGIONS:
        raise Refused("the handshake is not a list of regions")
    regions = []
    for each in found:
        numbers = []
        for name in ("base_host_virt_addr", "size", "offset"):
            number = each.get(name) if isinstance(each, dict) else None
            if type(number) is not int or not 0 <= number < _ADDRESSES or number % PAGE:
                raise Refused(f"a region has no {name} that would do")
            numbers.append(number)
        if each.get("page_size", each.get("page_size_kib")) not in (PAGE, PAGE // 1024):
            raise Refused("a region has pages of another size")
        low, size, offset = numbers
        regions.append((low, size, offset))
    for order in (0, 2):
        regions.sort(key=_operator.itemgetter(order))
        ends = [each[order] + each[1] for each in regions]
        if any(end > each[order] for end, each in zip(ends, regions[1:], strict=False)):
            raise Refused("regions overlap")
    if sum(each[1] for each in regions) != pages * PAGE or regions[-1][2] + regions[-1][1] != (
        pages * PAGE
    ):
        raise Refused("the regions are not the guest's memory")
    if not all(size for _, size, _ in regions):
        raise Refused("a region is empty")
    regions.sort()
    return [
        (offset // PAGE, (offset + size) // PAGE, low - offset) for low, size, offset in regions
    ]


class _Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class MappedFile:
    """A file that pages are copied from, mapped so that its address is known."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = 0 if fd < 0 else posix.fstat(fd).st_size
        self.bytes: mmap.mmap | bytes = b""
        self.address = 0
        if self.size:
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            self.bytes = mmap.mmap(fd, self.size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
            self.address = _ctypes.addressof(_Byte.from_buffer(self.bytes))


class Handler:
    """Serves one guest's memory. `around` is how many pages a fault brings: a power of two."""

    def __init__(self, base: MappedFile, diff: MappedFile, runs: "array.array[int]") -> None:
        self.pages = base.size // PAGE
        self._base, self._diff = base, diff
        self._base_data = (0, 0)
        self._firsts, counts = runs[::2], runs[1::2]
        self._ends = array.array("Q", map(_operator.add, self._firsts, counts))
        self._places = array.array("Q", itertools.accumulate(counts, initial=0))
        if base.size % PAGE or not base.size or self._places[-1] * PAGE != diff.size:
            raise Refused("base, index and diff do not fit together")
        self._state = bytearray(self.pages)
        self._copy_argument = bytearray(_COPY.size)
        self._zero_argument = bytearray(_ZEROPAGE.size)
        self._recorded: list[tuple[int, int]] = []
        self._recording = True
        self._waiting: list[int] = []
        self._later: dict[int, tuple[int, int, int, bytes, int]] = {}
        self._next = 0

    def serve(
        self, uffd: int, regions: list[Region], wanted: "array.array[int]", around: int
    ) -> None:
        """Give the guest the wanted runs first, then what it asks for; returns when it is gone.

        A fault brings its page at once. What is around it comes with it where the guest goes on
        from what it was given last, and with the next fault there. Otherwise it comes when nothing
        is asked for: the guest, not this process, runs first. Raises `Refused` and OSError.
        """
        self._uffd, self._regions, self._around = uffd, regions, around
        self._lows = [first * PAGE + delta for first, _, delta in regions]
        try:
            posix.set_blocking(uffd, False)
            self._prefetch(wanted)
            while True:
                ready, _, _ = select.select([uffd], [], [], _LATER_SEC if self._later else None)
                if ready:
                    self._take_in()
                else:
                    self._give_around(*self._later.popitem()[1])
        except ProcessLookupError:
            return

    def working_set(self) -> bytes:
        """End the recording; as much as there is room for of what was given first."""
        self._recording = False
        runs: list[tuple[int, int]] = []
        room = SET_PAGES
        for first, end in self._recorded:
            if end - first <= room:
                room -= end - first
                runs.append((first, end))
        numbers = array.array("I")
        last = 0
        for first, end in sorted(runs):
            if numbers and first <= last:
                numbers[-1] += max(0, end - last)
            else:
                numbers.extend((first, end - first))
            last = max(last, end)
        return encode_runs(SET_MAGIC, SET_VERSION, numbers, self.pages)

    def _prefetch(self, wanted: "array.array[int]") -> None:
        for first, count in zip(wanted[::2], wanted[1::2], strict=True):
            for low, high, delta in self._regions:
                self._prefetch_run(max(first, low), min(first + count, high), delta)

    def _prefetch_run(self, page: int, end: int, delta: int) -> None:
        state = self._state
        while 0 <= (page := state.find(_UNTOUCHED, page, end)) < end:
            piece = state[page : min(end, page + _CHUNK)]
            stop = page + len(piece) - len(piece.lstrip(_UNTOUCHED))
            self._record(page, stop)
            self._give(page, stop, delta)
            self._take_in()

    def _record(self, first: int, end: int) -> None:
        if self._recording and len(self._recorded) < SET_RUNS:
            self._recorded.append((first, end))

    def _take_in(self) -> None:
        """Answer what waits, if anything does."""
        try:
            self._read()
        except BlockingIOError:
            return
        while self._waiting:
            self._fault(self._waiting.pop())

    def _read(self) -> None:
        """Take in what has happened. What was removed comes before any page that is asked for."""
        data = posix.read(self._uffd, _EVENTS_AT_ONCE * _EVENT.size)
        for event, one, two in _EVENT.iter_unpack(data):
            if event == _PAGE_FAULT:
                if one & _MISSING_ONLY:
                    raise Refused("a fault of another kind than a missing page")
                self._waiting.append(two)
            elif event == _REMOVE:
                self._remove(one, two)
            else:
                if event == _FORK:
                    posix.close(one & 0xFFFF_FFFF)
                raise Refused(f"an event of kind {event:#x}")

    def _remove(self, start: int, end: int) -> None:
        for first, behind, delta in self._regions:
            low = max((start - delta) // PAGE, first)
            high = min((end - delta) // PAGE, behind)
            if low < high:
                self._state[low:high] = _REMOVED * (high - low)

    def _fault(self, address: int) -> None:
        at = bisect.bisect_right(self._lows, address) - 1
        first, behind, delta = self._regions[at]
        page = (address - delta) // PAGE
        if at < 0 or page >= behind:
            raise Refused("a fault outside the guest's memory")
        kind = bytes(self._state[page : page + 1])
        if kind == _GIVEN:
            self._missing_again(page, delta)
            return
        low = page & -self._around
        around = page, max(first, low), min(behind, low + self._around), kind, delta
        if self._later.pop(low, ()) or page == self._next:
            self._give_around(*around)
        elif self._around > 1:
            self._later[low] = around
        if kind == _UNTOUCHED:
            self._record(page, page + 1)
        while self._state[page : page + 1] != _GIVEN:
            self._give_or_zero(page, page + 1, delta)

    def _give_around(self, page: int, low: int, high: int, kind: bytes, delta: int) -> None:
        """Give a page, if it is not yet, and what is like it on both sides, within these bounds."""
        at = page + (self._state[page : page + 1] == _GIVEN)
        before, after = self._state[low:page], self._state[at:high]
        start = low + len(before.rstrip(kind))
        end = high - len(after.lstrip(kind))
        if kind == _UNTOUCHED:
            self._record(start, end)
        self._next = end
        if self._give_or_zero(at, end, delta):
            self._give_or_zero(start, page, delta)

    def _give_or_zero(self, first: int, end: int, delta: int) -> bool:
        """Give pages that are all alike: stored, or removed since."""
        if self._state[first:end].startswith(_REMOVED):
            return self._zero(first, end, delta)
        return self._give(first, end, delta)

    def _missing_again(self, page: int, delta: int) -> None:
        """A page that was given: removed since, or two threads asked for it at the same time."""
        while not self._zero(page, page + 1, delta):
            pass
        fcntl.ioctl(self._uffd, WAKE, _RANGE.pack(page * PAGE + delta, PAGE))

    def _give(self, first: int, end: int, delta: int) -> bool:
        """Give pages as they are stored; false where that has to be thought over again."""
        while first < end:
            run = bisect.bisect_right(self._firsts, first) - 1
            if run >= 0 and first < self._ends[run]:
                stop = min(end, self._ends[run])
                place = self._places[run] + first - self._firsts[run]
                done = self._from(self._diff, place, first, stop, delta)
            else:
                stop = end if run + 1 == len(self._firsts) else min(end, self._firsts[run + 1])
                low, high = self._base_data
                if not low <= first < high:
                    low, high = self._base_data = self._next_data(first)
                if first < low:
                    stop = min(stop, low)
                    done = self._zero(first, stop, delta)
                else:
                    stop = min(stop, high)
                    done = self._from(self._base, first, first, stop, delta)
            if not done:
                return False
            first = stop
        return True

    def _next_data(self, page: int) -> tuple[int, int]:
        """The pages of the next piece of the base that is no hole."""
        try:
            start = posix.lseek(self._base.fd, page * PAGE, posix.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if posix.fstat(self._base.fd).st_size != self._base.size:
                raise Refused("the base has been cut") from error
            return self.pages, self.pages
        end = posix.lseek(self._base.fd, start, posix.SEEK_HOLE)
        return start // PAGE, -(-end // PAGE)

    def _from(self, file: MappedFile, place: int, first: int, stop: int, delta: int) -> bool:
        """Give pages that are at this place of a file, those that hold zeros as such."""
        offset, end = place * PAGE, (place + stop - first) * PAGE
        heads = file.bytes[offset:end:PAGE]
        if 0 not in heads:
            return self._copy(file.address + offset, first, stop, delta)
        zeros = [
            not head and file.bytes[at : at + PAGE] == _ZEROS
            for head, at in zip(heads, range(offset, end, PAGE), strict=True)
        ]
        for zero, run in itertools.groupby(zeros):
            after = first + len(list(run))
            if zero:
                done = self._zero(first, after, delta)
            else:
                done = self._copy(file.address + offset, first, after, delta)
            if not done:
                return False
            offset += (after - first) * PAGE
            first = after
        return True

    def _copy(self, source: int, first: int, stop: int, delta: int) -> bool:
        argument = self._copy_argument
        while first < stop:
            size = (stop - first) * PAGE
            _COPY.pack_into(argument, 0, first * PAGE + delta, source, size, 0, 0)
            try:
                fcntl.ioctl(self._uffd, COPY, argument)
            except OSError as error:
                size = self._moved(error, _COPIED.unpack_from(argument)[0])
                if not size:
                    return False
            self._state[first : first + size // PAGE] = _GIVEN * (size // PAGE)
            source += size
            first += size // PAGE
        return True

    def _zero(self, first: int, stop: int, delta: int) -> bool:
        argument = self._zero_argument
        while first < stop:
            size = (stop - first) * PAGE
            _ZEROPAGE.pack_into(argument, 0, first * PAGE + delta, size, 0, 0)
            try:
                fcntl.ioctl(self._uffd, ZEROPAGE, argument)
            except OSError as error:
                size = self._moved(error, _ZEROED.unpack_from(argument)[0])
                if not size:
                    return False
            self._state[first : first + size // PAGE] = _GIVEN * (size // PAGE)
            first += size // PAGE
        return True

    def _moved(self, error: OSError, moved: int) -> int:
        """How many bytes are there after a call that did not do all; 0 when to plan anew.

        `moved` is the kernel's word: what it has done before it stopped. Raises other errors.
        """
        if moved > 0:
            return moved
        if error.errno == errno.EEXIST:
            return PAGE
        if error.errno != errno.EAGAIN:
            raise error
        self._settle()
        return 0

    def _settle(self) -> None:
        """Something is being removed, and the kernel lets nothing in until that is known."""
        try:
            self._read()
        except BlockingIOError:
            time.sleep(_PAUSE_SEC)  # it is known, and the thread that removes has to run


def take_handshake(listener: _socket.socket, pages: int) -> tuple[int, list[Region]]:
    """The userfaultfd and the regions of the first VMM that connects; raises `Refused`.

    It may keep its connection or close it. Nothing else is ever read from there.
    """
    fd, _ = listener._accept()  # type: ignore[attr-defined]
    connection = _socket.socket(fileno=fd)
    listener.close()
    text = b""
    uffd = -1
    while not text.rstrip().endswith(b"]"):
        room = _HANDSHAKE_LIMIT - len(text)
        data, ancillary, flags, _ = connection.recvmsg(room, _socket.CMSG_LEN(4), 0)
        for _, kind, content in ancillary:
            if kind == _socket.SCM_RIGHTS and len(content) == 4:
                (received,) = struct.unpack("=i", content)
                if uffd >= 0 or flags & _socket.MSG_CTRUNC:
                    raise Refused("the handshake brings more than one descriptor")
                uffd = received
        if not data:
            raise Refused("the handshake is incomplete or too long")
        text += data
    if uffd < 0:
        raise Refused("the handshake brings no descriptor")
    if posix.readlink(f"/proc/self/fd/{uffd}") != _USERFAULTFD:
        raise Refused("the descriptor of the handshake is no userfaultfd")
    try:
        return uffd, parse_regions(text.decode("utf-8"), pages)
    except UnicodeDecodeError as error:
        raise Refused("the handshake is not text") from error


class Control:
    """The line to the server, watched by a thread of its own.

    The process ends with its machine, and with a server that is gone before there was one.
    """

    def __init__(self, fd: int) -> None:
        self._socket = _socket.socket(fileno=fd)
        self._known = _thread.allocate_lock()
        self._known.acquire()
        self.handler: Handler | None = None

    def say(self, message: bytes) -> None:
        """To a server that is gone as well."""
        try:
            self._socket.send(message, _socket.MSG_NOSIGNAL)
        except OSError:
            return

    def watch(self) -> None:
        """Until the process ends."""
        try:
            self._watch()
        except BaseException as error:
            self.say(FAILED + str(error).encode())
            posix._exit(1)

    def until_machine_is_known(self) -> None:
        """Wait for the server to say which process the machine is."""
        self._known.acquire()

    def _watch(self) -> None:
        machine = -1
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while True:
            if any(fd == machine for fd, _ in poll.poll()):
                posix._exit(0)
            message, ancillary, _, _ = self._socket.recvmsg(16, _socket.CMSG_LEN(4))
            if message == MACHINE and machine < 0:
                (machine,) = struct.unpack("=i", ancillary[0][2])
                poll.register(machine, select.POLLIN)
                self._known.release()
            elif message == STOP and self.handler is not None:
                self.say(self.handler.working_set())
            elif not message:
                if machine < 0:
                    posix._exit(0)
                poll.unregister(self._socket)


def main(argv: list[str]) -> None:
    """Serve until the machine ends; see the module."""
    around, listener, fd, base, index, diff, working_set = map(int, argv[2:])
    control = Control(fd)
    _thread.start_new_thread(control.watch, ())
    try:
        pages = posix.fstat(base).st_size // PAGE
        runs = array.array("I")
        if index >= 0:
            data = _content(index, index_limit(pages))
            runs = decode_runs(data, INDEX_MAGIC, INDEX_VERSION, pages)
        handler = control.handler = Handler(MappedFile(base), MappedFile(diff), runs)
        try:
            wanted = decode_set(_content(working_set, SET_LIMIT), pages)
        except ValueError:
            wanted = array.array("I")  # it is only a hint
        control.until_machine_is_known()
        uffd, regions = take_handshake(_socket.socket(fileno=listener), pages)
        where = [b"%d %d %d" % (first, end, first * PAGE + at) for first, end, at in regions]
        control.say(SERVING + b" ".join(where))
        handler.serve(uffd, regions, wanted, around)
    except Exception as error:
        control.say(FAILED + f"{type(error).__name__}: {error}".encode())
        posix._exit(1)
    posix._exit(0)


def _content(fd: int, limit: int) -> bytes:
    """What is in a file of which there may be none, to a byte more than the limit."""
    content = b""
    while fd >= 0 and (piece := posix.read(fd, limit + 1 - len(content))):
        content += piece
    return content


if __name__ == "__main__":
    main(sys.argv)
