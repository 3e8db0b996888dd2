"""The Host interface: everything the control plane may ask of one machine.

Every call is safe to repeat: it names its sandbox and its operation, and a repeated call of the
same operation gives the first one's answer. Calls raise `errors.WrennError` only. No call hands
over open files, callbacks or objects of the caller's.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from wrenn_sandbox.ids import ImageId, OperationId, SandboxId

from .messages import (
    BaseTemplate,
    Command,
    CommandResult,
    CreateSandbox,
    Egress,
    FileContent,
    FileEntry,
    GuestMetrics,
    HostEvent,
    HostInfo,
    ImageInfo,
    Placement,
    ProcessInfo,
    ProcessRef,
    ProcessSignal,
    ProcessStream,
    SandboxReport,
    TerminalSize,
    Unpacked,
)


class Host(Protocol):
    async def claim(self, owner: str, *, expected: bool) -> None:
        """Take the host for the installation `owner`; to be called before anything else.

        The host remembers its owner for good. `Conflict`: its sandboxes or kept images belong
        to another one and would be taken for such that nobody wants. A host without any changes
        hands, unless the new owner has `expected` sandboxes here, which then would be taken for
        lost: `Conflict` again.
        """
        ...

    async def info(self) -> HostInfo:
        """What the machine is and has left."""
        ...

    async def templates(self) -> list[BaseTemplate]:
        """The templates built on this host, by name."""
        ...

    async def create(self, request: CreateSandbox) -> Placement:
        """Start a machine and wait until its agent has answered.

        On failure nothing of it is left. `NotFound`: no such image. `NoCapacity`: the host is
        full; nothing was started. `HostFailure`, `IncompatibleImage`: it did not start.
        """
        ...

    async def destroy(self, sandbox_id: SandboxId, operation_id: OperationId) -> None:
        """End the machine and free all it has, running, starting or paused; unknown is done."""
        ...

    async def pause(self, sandbox_id: SandboxId, operation_id: OperationId) -> None:
        """Store the machine on disk and free everything else; on failure it runs on.

        `NotFound`: not running here.
        """
        ...

    async def resume(
        self,
        sandbox_id: SandboxId,
        operation_id: OperationId,
        network: Egress,
        *,
        memory: bool = True,
    ) -> Placement:
        """Continue a stored machine; on failure it stays stored, untouched.

        Without `memory` it is booted from its disk first: its files are there, its processes are
        not, and its disk alone has to fit this host. `network` holds from its first moment.
        `NotFound`: not stored here. `NoCapacity`, `HostFailure`, `IncompatibleImage` as in create.
        """
        ...

    async def set_network(
        self, sandbox_id: SandboxId, operation_id: OperationId, network: Egress
    ) -> None:
        """Let a running machine reach what this policy says, for open connections too.

        On failure the old policy or the new one holds, and `sandboxes()` says which.
        `NotFound`: not running here.
        """
        ...

    async def snapshot(
        self, sandbox_id: SandboxId, operation_id: OperationId, image_id: ImageId
    ) -> ImageInfo:
        """Make an image of a running machine, which is gone afterwards.

        On failure the machine runs on and no image is left. `NotFound`: not running here.
        """
        ...

    async def remove_image(self, image_id: ImageId) -> None:
        """Give up an image; its files go when the last sandbox made from it goes."""
        ...

    async def held_images(self) -> list[ImageInfo]:
        """The images made by `snapshot` that were not given up."""
        ...

    async def sandboxes(self) -> list[SandboxReport]:
        """Every sandbox that runs or is stored here."""
        ...

    async def events(self, after: int) -> list[HostEvent]:
        """The events numbered above `after`, oldest first; waits until there is one.

        Numbers start at 1 with each start of the host; old events may have been forgotten, which
        `sandboxes()` makes good.
        """
        ...

    async def exec(
        self, sandbox_id: SandboxId, command: Command, *, timeout: float, output_limit: int
    ) -> CommandResult:
        """Run a command to its end, at most `timeout` seconds, then kill its process group.

        At most `output_limit` bytes of each stream are kept. A command that does not exist has
        exit code 127, one that can not be executed 126. `NotFound`: the sandbox does not run
        here. `InvalidRequest`: unknown user or directory. `AgentError`: the guest failed.
        """
        ...

    async def health(self, sandbox_id: SandboxId) -> None:
        """Ask the guest's agent whether it is there; whatever it says, it is.

        `NotResponding`: it cannot be reached. An answer that does not come is waited for.
        """
        ...

    async def metrics(self, sandbox_id: SandboxId) -> GuestMetrics:
        """Use of resources inside the guest now."""
        ...

    def read_file(
        self, sandbox_id: SandboxId, path: str
    ) -> AbstractAsyncContextManager[FileContent]:
        """The content of a regular file, as long as the block lasts.

        `NotInGuest`: there is no such file. `InvalidRequest`: it is a directory or a device, or
        the path is not acceptable.
        """
        ...

    async def write_file(
        self,
        sandbox_id: SandboxId,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        user: str | None = None,
        mode: int | None = None,
    ) -> None:
        """Replace or make a file, parents too, with all of `chunks` or not at all.

        What is new belongs to `user` (root); what is replaced keeps owner, attributes and hard
        links, and without `mode` (0644 for a new file) its permission bits. What `chunks` raises is
        raised here, and the file is as it was. `InvalidRequest`: the target is a directory or a
        device, there is no such user. `NoSpace`: the guest's disk is full.
        """
        ...

    async def list_directory(self, sandbox_id: SandboxId, path: str, depth: int) -> list[FileEntry]:
        """What is in a directory, `depth` levels down. `NotInGuest`, `InvalidRequest`."""
        ...

    async def make_directory(
        self, sandbox_id: SandboxId, path: str, *, user: str | None = None, mode: int | None = None
    ) -> FileEntry:
        """Make a directory and its parents, for `user` (root); `mode` (0755) is its own.

        `Conflict`: something is there already. `InvalidRequest`: there is no such user.
        """
        ...

    async def remove_path(self, sandbox_id: SandboxId, path: str) -> None:
        """Remove a file or a directory with all that is in it. `NotInGuest`."""
        ...

    def pack(
        self, sandbox_id: SandboxId, path: str, *, recursive: bool, user: str | None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """A file, or (`recursive`) a tree too, as a tar archive, as long as the block lasts.

        Modes, times, symbolic and hard links come along. What `user`, by default root, cannot
        read is left out and noted in the archive. Raises `AgentError` where the transfer breaks
        off. `NotInGuest`: there is no such path. `InvalidRequest`: it is no file, or cannot be
        read. `Conflict`: the guest's agent is too old.
        """
        ...

    async def unpack(
        self,
        sandbox_id: SandboxId,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        needs_directory: bool,
        user: str | None,
    ) -> Unpacked:
        """Put what a tar archive holds into a directory, or in the place of `path`, as `cp` would.

        With `needs_directory` only the former, and the directory must be there already. All of it
        is `user`'s, by default root's, and done with that user's rights. A file takes its place
        when it is complete; what `chunks` raises is raised here, and what came before stays.
        `InvalidRequest`: the archive is malformed, or does not fit `path`. `NoSpace`: the
        guest's disk is full. `Conflict`: the guest's agent is too old.
        """
        ...

    async def processes(self, sandbox_id: SandboxId) -> list[ProcessInfo]:
        """The commands that run in the guest."""
        ...

    def start_process(
        self,
        sandbox_id: SandboxId,
        command: Command,
        *,
        tag: str | None = None,
        stdin: bool = False,
        terminal: TerminalSize | None = None,
    ) -> AbstractAsyncContextManager[ProcessStream]:
        """Start a command and follow it; leaving the block does not end it.

        Without `stdin` its input is empty; on a terminal its input is the terminal. Errors as in
        `exec`; a command that does not exist ends with 127, one that can not be executed with 126.
        """
        ...

    async def start_detached(self, sandbox_id: SandboxId, command: Command, *, tag: str) -> int:
        """Start a command without input that nobody follows yet; returns its pid.

        What it says and how it ends is kept for who attaches later, within bounds.
        `InvalidRequest`: it can not be started.
        """
        ...

    def attach_process(
        self, sandbox_id: SandboxId, process: ProcessRef, *, replay: bool
    ) -> AbstractAsyncContextManager[ProcessStream]:
        """Follow a running command; with `replay` first what it said before, as far as it is kept.

        `NotInGuest`: there is no such command.
        """
        ...

    async def send_input(
        self, sandbox_id: SandboxId, pid: int, data: bytes, *, terminal: bool
    ) -> None:
        """Write to a command's stdin or terminal; returns when it has taken all of it.

        `NotInGuest`: it has ended. `Conflict`: its stdin is closed.
        """
        ...

    async def close_input(self, sandbox_id: SandboxId, pid: int) -> None:
        """Close a command's stdin after all that was sent. `NotInGuest`."""
        ...

    async def resize_terminal(self, sandbox_id: SandboxId, pid: int, size: TerminalSize) -> None:
        """Tell a command of its terminal's new size. `NotInGuest`, `Conflict`."""
        ...

    async def signal_process(
        self, sandbox_id: SandboxId, process: ProcessRef, signal: ProcessSignal
    ) -> None:
        """Signal a command's process group. `NotInGuest`."""
        ...
