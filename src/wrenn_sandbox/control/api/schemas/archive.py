"""Archives of a sandbox's files: `/v1/sandboxes/{id}/files/archive`."""

from typing import Self

from wrenn_sandbox.wire import messages

from .fields import Response


class LeftOut(Response):
    """A path that was not copied, and why."""

    path: str
    reason: str


class UnpackedArchive(Response):
    """Of `left_out_count` paths that were left out `left_out` names the first.

    `size` is of the files in it, in bytes. `into_directory`: it was put into `path`, not in its
    place.
    """

    entries: int
    size: int
    into_directory: bool
    left_out: list[LeftOut]
    left_out_count: int

    @classmethod
    def of(cls, unpacked: messages.Unpacked) -> Self:
        return cls(
            entries=unpacked.entries,
            size=unpacked.size,
            into_directory=unpacked.into_directory,
            left_out=[LeftOut(path=each.path, reason=each.reason) for each in unpacked.left_out],
            left_out_count=unpacked.left_out_count,
        )
