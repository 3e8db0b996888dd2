"""The Host interface: everything the control plane may ask of one machine.

Every call is safe to repeat: it names its sandbox and its operation, and a repeated call of the
same operation gives the first one's answer. Calls raise `errors.WrennError` only. No call hands
over open files, callbacks or objects of the caller's.
"""

from typing import Protocol

from wrenn_sandbox.ids import ImageId, OperationId, SandboxId

from .messages import (
    BaseTemplate,
    Command,
    CommandResult,
    CreateSandbox,
    GuestMetrics,
    HostEvent,
    HostInfo,
    ImageInfo,
    Placement,
    SandboxReport,
)


class Host(Protocol):
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

    async def resume(self, sandbox_id: SandboxId, operation_id: OperationId) -> Placement:
        """Continue a stored machine; on failure it stays stored, untouched.

        `NotFound`: not stored here. `NoCapacity`, `HostFailure`, `IncompatibleImage` as in create.
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

    async def metrics(self, sandbox_id: SandboxId) -> GuestMetrics:
        """Use of resources inside the guest now."""
        ...
