"""The Guest interface: everything the control plane may ask of one running VM's guest.

`Host.guest` gives it. Each call raises `NotFound` where the sandbox does not run on that host,
and `AgentError` where the guest fails. A call whose answer was lost may have been done: each says
whether it is safe to repeat then. No call hands over open files, callbacks or objects of the
caller's: arguments and answers are data or streams of bytes.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

from .messages import (
    Command,
    CommandResult,
    FileContent,
    FileEntry,
    GuestMetrics,
    GuestPath,
    ProcessInfo,
    ProcessRef,
    ProcessSignal,
    ProcessStream,
    TerminalSize,
    Unpacked,
)

AGENT_PORT: Final = 49983
"""Where a guest's agent listens."""


class Guest(Protocol):
    async def health(self) -> None:
        """Ask the guest's agent whether it is there; whatever it says, it is.

        `NotResponding`: it cannot be reached. An answer that does not come is waited for.
        Safe to repeat.
        """
        ...

    async def metrics(self) -> GuestMetrics:
        """Use of resources inside the guest now. Safe to repeat."""
        ...

    async def exec(self, command: Command, *, timeout: float, output_limit: int) -> CommandResult:
        """Run a command to its end, at most `timeout` seconds, then kill its process group.

        At most `output_limit` bytes of each stream are kept. A command that does not exist has
        exit code 127, one that cannot be executed 126. `InvalidRequest`: unknown user or
        directory. Not safe to repeat: the command runs again.
        """
        ...

    def read_file(self, path: GuestPath) -> AbstractAsyncContextManager[FileContent]:
        """The content of a regular file, as long as the block lasts.

        `NotInGuest`: there is no such file. `InvalidRequest`: it is a directory or a device, or
        the path is not acceptable. Safe to repeat.
        """
        ...

    async def write_file(
        self,
        path: GuestPath,
        chunks: AsyncIterator[bytes],
        *,
        user: str | None = None,
        mode: int | None = None,
    ) -> None:
        """Replace or make a file, parents too, with all of `chunks` or not at all.

        What is new belongs to `user` (root); what is replaced keeps owner, attributes and hard
        links, and without `mode` (0644 for a new file) its permission bits. What `chunks` raises is
        raised here, and the file is as it was. `InvalidRequest`: the target is a directory or a
        device, there is no such user. `NoSpace`: the guest's disk is full. Not safe to repeat
        unseen: a file that another wrote in between is replaced.
        """
        ...

    async def list_directory(self, path: GuestPath, depth: int) -> list[FileEntry]:
        """What is in a directory, `depth` levels down.

        `NotInGuest`: there is no such path. `InvalidRequest`: it is no directory. Safe to repeat.
        """
        ...

    async def make_directory(
        self, path: GuestPath, *, user: str | None = None, mode: int | None = None
    ) -> FileEntry:
        """Make a directory and its parents, for `user` (root); `mode` (0755) is its own.

        `Conflict`: something is there already. `InvalidRequest`: there is no such user.
        Not safe to repeat: the second call finds the directory of the first.
        """
        ...

    async def remove_path(self, path: GuestPath) -> None:
        """Remove a file or a directory with all that is in it.

        `NotInGuest`: there is no such path. Not safe to repeat: nothing is there the second time,
        or something new.
        """
        ...

    def pack(
        self, path: GuestPath, *, recursive: bool, user: str | None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """A file, or (`recursive`) a tree too, as a tar archive, as long as the block lasts.

        Modes, times, symbolic and hard links come along. What `user`, by default root, cannot
        read is left out and noted in the archive. Raises `AgentError` where the transfer breaks
        off. `NotInGuest`: there is no such path. `InvalidRequest`: it is no file, or cannot be
        read. `Conflict`: the guest's agent is too old. Safe to repeat.
        """
        ...

    async def unpack(
        self,
        path: GuestPath,
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
        guest's disk is full. `Conflict`: the guest's agent is too old. Not safe to repeat: the
        second time `path` may be a directory, and takes the archive into itself.
        """
        ...

    async def processes(self) -> list[ProcessInfo]:
        """The commands that run in the guest. Safe to repeat."""
        ...

    def start_process(
        self,
        command: Command,
        *,
        tag: str | None = None,
        stdin: bool = False,
        terminal: TerminalSize | None = None,
    ) -> AbstractAsyncContextManager[ProcessStream]:
        """Start a command and follow it; leaving the block does not end it.

        Without `stdin` its input is empty; on a terminal its input is the terminal. Errors as in
        `exec`; a command that does not exist ends with 127, one that cannot be executed with 126.
        Not safe to repeat: a second command starts.
        """
        ...

    async def start_detached(self, command: Command, *, tag: str) -> int:
        """Start a command without input that nobody follows yet; returns its pid.

        What it says and how it ends is kept for who attaches later, within bounds.
        `InvalidRequest`: it cannot be started. Not safe to repeat: a second command starts.
        """
        ...

    def attach_process(
        self, process: ProcessRef, *, replay: bool
    ) -> AbstractAsyncContextManager[ProcessStream]:
        """Follow a running command; with `replay` first what it said before, as far as it is kept.

        `NotInGuest`: there is no such command. Safe to repeat.
        """
        ...

    async def send_input(self, pid: int, data: bytes, *, terminal: bool) -> None:
        """Write to a command's stdin or terminal; returns when it has taken all of it.

        `NotInGuest`: it has ended. `Conflict`: its stdin is closed. Not safe to repeat: the
        command reads the data twice.
        """
        ...

    async def close_input(self, pid: int) -> None:
        """Close a command's stdin after all that was sent.

        `NotInGuest`: it has ended. Safe to repeat.
        """
        ...

    async def resize_terminal(self, pid: int, size: TerminalSize) -> None:
        """Tell a command of its terminal's new size.

        `NotInGuest`: it has ended. `Conflict`: it has no terminal. Safe to repeat.
        """
        ...

    async def signal_process(self, process: ProcessRef, signal: ProcessSignal) -> None:
        """Signal a command's process group.

        `NotInGuest`: it has ended. Not safe to repeat: the signal arrives twice, or a newer
        command with the same tag takes it.
        """
        ...

    def connect(
        self, port: int, sent: AsyncIterator[bytes]
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """A TCP connection to a port of the guest, loopback addresses too, as long as the block.

        It carries `sent`, whose end closes this direction alone, and gives what comes back until
        that ends; reading slowly slows the guest down. What `sent` raises breaks the connection and
        is raised there. Raises `AgentError`, also there, where it breaks off. `PortNotOpen`:
        nothing listens there. `Conflict`: the guest's agent is too old. Not safe to repeat: `sent`
        may have been read.
        """
        ...

    async def agent_token(self) -> str:
        """What the guest's agent, on `AGENT_PORT`, wants as `X-Access-Token` in its present life.

        Safe to repeat.
        """
        ...
