"""What a sandbox used, as a file of fixed size: each moment has its place in it.

The first part has a place for each five seconds of an hour, the second one for each minute of a
day: the sample of a minute is made of those within it. A place is overwritten when its turn comes
again, and a checksum tells what a loss of power left half-written. Nothing is synced: what was
measured outlives the server, and a loss of power costs the last seconds. All functions block.
"""

import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from wrenn_sandbox.host.slot import Traffic
from wrenn_sandbox.wire.messages import Sample

STEP_SEC: Final = 5
MINUTE_SEC: Final = 60
_STEPS: Final = 3600 // STEP_SEC
_MINUTES: Final = 24 * 60
FINE_SEC: Final = _STEPS * STEP_SEC
"""How long every sample is kept; of older ones each minute's."""
KEPT_SEC: Final = _MINUTES * MINUTE_SEC

_NUMBERS: Final = (
    "mem_total",
    "mem_used",
    "mem_cache",
    "disk_total",
    "disk_used",
    "net_received",
    "net_sent",
)
_FORM: Final = struct.Struct(f"<IIIf{len(_NUMBERS)}Q3Q")
"""Checksum of the rest, Unix time, CPUs and their use, the numbers, and how far a VM's network
counters were with the VM that they are of."""
_CHECKSUM: Final = struct.Struct("<I")
_UNKNOWN: Final = 2**64 - 1


class Stored(msgspec.Struct, frozen=True):
    """A sample, and what tells how much later ones have to add to it."""

    sample: Sample
    life: int = 0
    """Which VM the counters are of."""
    counted: Traffic = Traffic(0, 0)

    def added(self, life: int, counted: Traffic) -> Traffic:
        """All that the sandbox has received and sent when the counters of a VM are this far."""
        before = self.counted if life == self.life else Traffic(0, 0)
        return Traffic(
            (self.sample.net_received or 0) + max(0, counted.received - before.received),
            (self.sample.net_sent or 0) + max(0, counted.sent - before.sent),
        )


def _packed(stored: Stored) -> bytes:
    sample = stored.sample
    numbers = (getattr(sample, name) for name in _NUMBERS)
    data = _FORM.pack(
        0,
        sample.time,
        sample.cpu_count,
        sample.cpu_used_pct,
        *(_UNKNOWN if each is None else min(each, _UNKNOWN - 1) for each in numbers),
        stored.life,
        stored.counted.received,
        stored.counted.sent,
    )
    body = data[_CHECKSUM.size :]
    return _CHECKSUM.pack(zlib.crc32(body)) + body


def _unpacked(data: bytes) -> Stored | None:
    checksum, time, cpus, used, *rest = _FORM.unpack(data)
    if time == 0 or checksum != zlib.crc32(data[_CHECKSUM.size :]):
        return None
    numbers = (None if each == _UNKNOWN else each for each in rest[: len(_NUMBERS)])
    life, received, sent = rest[len(_NUMBERS) :]
    return Stored(
        Sample(
            time=time,
            cpu_count=cpus,
            cpu_used_pct=round(used, 2),
            **dict(zip(_NUMBERS, numbers, strict=True)),
        ),
        life,
        Traffic(received, sent),
    )


class SampleFile:
    """The samples of one sandbox; there is no file before the first."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, stored: Stored) -> None:
        """Write a sample in its place; raises OSError."""
        time = stored.sample.time
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, _packed(stored), _FORM.size * _step(time))
            begin = time - time % MINUTE_SEC
            found = _read(fd, _step(begin), MINUTE_SEC // STEP_SEC)
            within = [each for each in found if begin <= each.sample.time < begin + MINUTE_SEC]
            os.pwrite(fd, _packed(_merged(begin, within)), _FORM.size * _minute(begin))
        finally:
            os.close(fd)

    def between(self, start: int, end: int, step: int) -> list[Sample]:
        """Those of a time, both ends included, oldest first; `step` is one of the two."""
        first, count = (0, _STEPS) if step == STEP_SEC else (_STEPS, _MINUTES)
        found = [each.sample for each in self._all(first, count)]
        return sorted(
            (each for each in found if start <= each.time <= end), key=lambda each: each.time
        )

    def newest(self) -> Stored | None:
        """The last one that was written, however long ago."""
        return max(self._all(0, _STEPS), key=lambda each: each.sample.time, default=None)

    def _all(self, first: int, count: int) -> list[Stored]:
        with suppress(FileNotFoundError), open(self._path, "rb") as file:
            return _read(file.fileno(), first, count)
        return []


def _step(time: int) -> int:
    return time // STEP_SEC % _STEPS


def _minute(time: int) -> int:
    return _STEPS + time // MINUTE_SEC % _MINUTES


def _read(fd: int, first: int, count: int) -> list[Stored]:
    data = os.pread(fd, _FORM.size * count, _FORM.size * first)
    whole = len(data) - len(data) % _FORM.size
    places = (data[at : at + _FORM.size] for at in range(0, whole, _FORM.size))
    return [stored for place in places if (stored := _unpacked(place)) is not None]


def _merged(time: int, found: Sequence[Stored]) -> Stored:
    """The sample of a minute: the mean of those within it; what was counted is as in the last."""
    last = max(found, key=lambda each: each.sample.time)
    samples = [each.sample for each in found]
    means = {
        name: _mean([getattr(each, name) for each in samples])
        for name in _NUMBERS
        if not name.startswith("net_")
    }
    used = sum(each.cpu_used_pct for each in samples) / len(samples)
    sample = msgspec.structs.replace(last.sample, time=time, cpu_used_pct=used, **means)
    return msgspec.structs.replace(last, sample=sample)


def _mean(values: Sequence[int | None]) -> int | None:
    known = [each for each in values if each is not None]
    return sum(known) // len(known) if known else None
