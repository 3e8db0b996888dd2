"""The Host interface: everything the control plane may ask of one host.

Calls raise `errors.WrennError` only. Every call is safe to repeat after a lost answer, as it says:
those that change something name their sandbox or image and give the first call's answer, or find
it done. Calls into a guest are another matter; see `Guest`. Arguments and answers are data.
"""

from typing import Protocol

from wrenn_sandbox.ids import ImageId, OperationId, SandboxId
from wrenn_sandbox.model.secrets import Injection

from .guest import Guest
from .messages import (
    BaseTemplate,
    CreateSandbox,
    Egress,
    HostEvents,
    HostInfo,
    ImageInfo,
    LogLine,
    Placement,
    Sample,
    Samples,
    SandboxReport,
    TemplateImage,
)
from .metrics import HostMetrics


class Host(Protocol):
    async def claim(self, owner: str, *, expected: bool) -> None:
        """Take the host for the installation `owner`; to be called before anything else.

        The host remembers its owner for good. `Conflict`: its sandboxes or kept images belong
        to another one and would be taken for such that nobody wants. A host without any changes
        hands, unless the new owner has `expected` sandboxes here, which then would be taken for
        lost: `Conflict` again. Safe to repeat by the same owner.
        """
        ...

    async def info(self) -> HostInfo:
        """What the host is and has left. Safe to repeat."""
        ...

    async def metrics(self) -> HostMetrics:
        """What the host has left and what it has counted since its start. Safe to repeat."""
        ...

    async def templates(self) -> list[BaseTemplate]:
        """The templates built on this host, by name. Safe to repeat."""
        ...

    async def template_image(self, name: str) -> TemplateImage:
        """The image and size of one of them. `NotFound`: there is none. Safe to repeat."""
        ...

    async def create(self, request: CreateSandbox) -> Placement:
        """Start a VM and wait until its agent has answered.

        A snapshot whose engine the operator has retired is started from its disk, and the placement
        says why. On failure nothing of it is left. `NotFound`: no such image. `NoCapacity`: the
        host is full; nothing was started. `HostFailure`, `IncompatibleImage`: it did not start.
        Safe to repeat with the same operation: the sandbox is started once. `Conflict`: another
        operation made it.
        """
        ...

    async def destroy(self, sandbox_id: SandboxId, operation_id: OperationId) -> None:
        """End the VM and free all it has, running, starting or paused; unknown is done.

        Safe to repeat.
        """
        ...

    async def pause(self, sandbox_id: SandboxId, operation_id: OperationId) -> None:
        """Store the VM on disk and free everything else; on failure it runs on.

        `NotFound`: not here. Safe to repeat: a paused sandbox is done.
        """
        ...

    async def resume(
        self,
        sandbox_id: SandboxId,
        operation_id: OperationId,
        network: Egress,
        *,
        memory: bool = True,
        envs: dict[str, str] | None = None,
        injection: Injection | None = None,
    ) -> Placement:
        """Continue a stored VM; on failure it stays stored, untouched.

        Without `memory` it is booted from its disk first: its files are there, its processes are
        not, and its disk alone has to fit this host. So is one whose engine the operator has
        retired, and the placement says why. `network` holds from its first moment, and every new
        command finds `envs` in its environment: those of before where there are none. Without an
        `injection` the names of rules for secrets are closed; the host keeps none on its disk.
        `NotFound`: not here. `NoCapacity`, `HostFailure`, `IncompatibleImage` as in create.
        Safe to repeat: a running sandbox is done, and keeps the policy that it has.
        """
        ...

    async def set_network(
        self,
        sandbox_id: SandboxId,
        operation_id: OperationId,
        network: Egress,
        *,
        injection: Injection | None = None,
    ) -> None:
        """Let a running VM reach what this policy says, for open connections too.

        Another `injection` holds from the next request on. On failure the old policy or the new one
        holds, and `sandboxes()` says which.
        `NotFound`: not running here. Safe to repeat, unless another policy was set in between.
        """
        ...

    async def snapshot(
        self, sandbox_id: SandboxId, operation_id: OperationId, image_id: ImageId
    ) -> ImageInfo:
        """Make an image of a running VM, which is gone afterwards.

        On failure the VM runs on and no image is left. `NotFound`: not running here.
        Safe to repeat with the same image id: the image that is there is the answer.
        """
        ...

    async def checkpoint(
        self, sandbox_id: SandboxId, operation_id: OperationId, image_id: ImageId
    ) -> ImageInfo:
        """Make an image of a VM, which runs on or stays stored; its guest stands still a moment.

        The image is kept until it is given up. On failure none is left, and the sandbox is as it
        was. `NotFound`: not here. `InvalidState`: it cannot be told from its disk alone, or has
        to be paused and resumed first. `NoCapacity`: no disk space, or not just now.
        Safe to repeat with the same image id: the image that is there is the answer.
        """
        ...

    async def rollback(
        self,
        sandbox_id: SandboxId,
        operation_id: OperationId,
        image_id: ImageId,
        network: Egress,
        *,
        envs: dict[str, str] | None = None,
        injection: Injection | None = None,
    ) -> Placement:
        """Continue an image instead of a running or stored VM, of which nothing is left then.

        Both run for a moment: there has to be room for the new one. `network` holds from its first
        moment; `envs` and `injection` are as in resume. On failure the sandbox is as it was.
        `NotFound`: it or the image is not here. `NoCapacity`, `HostFailure`, `IncompatibleImage`
        as in create. Safe to repeat with the same operation, as long as nothing else was done to
        it since.
        """
        ...

    async def remove_image(self, image_id: ImageId) -> None:
        """Give up an image; its files go when the last sandbox made from it goes.

        Safe to repeat.
        """
        ...

    async def held_images(self) -> list[ImageInfo]:
        """The images made by `snapshot` and `checkpoint` that were not given up. Safe to repeat."""
        ...

    async def sandboxes(self) -> list[SandboxReport]:
        """Every sandbox that runs or is stored here. Safe to repeat."""
        ...

    async def samples(self, sandbox_id: SandboxId, start: int, end: int) -> Samples:
        """What a sandbox used between two moments in Unix seconds, at most 1440 samples.

        One each five seconds where it begins within the last hour, else one each minute of the last
        day. Of a sandbox that is not here any more they are kept for a day. None of an unknown one,
        and of times at which it did not run. Safe to repeat.
        """
        ...

    async def last_sample(self, sandbox_id: SandboxId) -> Sample | None:
        """The last sign of life of a sandbox, kept like the others. Safe to repeat."""
        ...

    async def log(
        self, sandbox_id: SandboxId, cursor: int | None, *, backward: bool, limit: int
    ) -> list[LogLine]:
        """What its guest wrote to its console: the next lines behind the number `cursor`.

        With `backward` those before it, newest first. Without a cursor from the oldest line, or the
        newest. Kept within bounds, and for a day of a sandbox that is not here any more; none of an
        unknown one. Safe to repeat.
        """
        ...

    async def events(self, epoch: str, after: int) -> HostEvents:
        """The host's events, oldest first; waits until there is one.

        Each start of the host begins a new epoch, whose events are numbered from 1. Of `epoch`
        those above `after` are given; where the host's epoch is another one by now, all of it.
        Old events may have been forgotten, which `sandboxes()` makes good. Safe to repeat.
        """
        ...

    def guest(self, sandbox_id: SandboxId) -> Guest:
        """Calls into the guest of a sandbox.

        `NotFound`, here or from its calls: the sandbox does not run on this host.
        """
        ...
