"""Archives of a sandbox's files: `/v1/sandboxes/{id}/files/archive`."""

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
