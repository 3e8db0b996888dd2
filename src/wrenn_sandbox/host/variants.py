"""Snapshots of templates, one for each size of machine that somebody asked for.

A variant is made by booting the template once: the guest is warmed up, stopped and stored. Its
id follows from what it depends on, so it is found again, and made anew where that has changed.
Where it is damaged another one is made beside it: memory and disk of what is stored are over the
one that there was, and no second boot gives the same.
"""

import asyncio
import itertools
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import structlog

from wrenn_sandbox.errors import HostFailure, IncompatibleImage, NotFound, WrennError
from wrenn_sandbox.host.images.manifest import HardwareProfile, Manifest
from wrenn_sandbox.host.images.staging import take
from wrenn_sandbox.host.images.store import disk_beside
from wrenn_sandbox.ids import ImageId
from wrenn_sandbox.model.template import Size
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.messages import Command

from . import admission
from .compatibility import differences, profile
from .context import HostContext
from .disk.base import DiskFormat
from .images import manifest as form
from .journal import Record
from .launch_source import LaunchSource
from .machine import Machine

_log = structlog.get_logger(__name__)

_MEMORY: Final = "memory"
_LAYER: Final = "layer"
_HOSTNAME: Final = f"template-{'x' * 13}"
"""With a digit more it is as long as a sandbox's, so that files of the guest keep their size."""
_ROUNDS: Final = 10
"""How often the guest agent does what every sandbox asks of it. CPython writes into the code of a
function in its first calls, until it has settled (measured: 8): what has not settled, each guest
writes for itself, at every start."""
_WARM_UP_SEC: Final = 120.0
_WARM_UP: Final = (
    Command(cmd="/bin/true"),
    Command(cmd="/bin/sh", args=("-c", "ls / >/dev/null; sync")),
    Command(cmd="python3", args=("-c", "import json, os, sys, time")),
    Command(
        cmd="/bin/sh",
        args=(
            "-c",
            "i=0; while [ $i -lt 150 ] && grep -qs ext4lazyinit /proc/[0-9]*/comm; do"
            " sleep 0.1; i=$((i+1)); done; sync",
        ),
    ),
    *(Command(cmd="/bin/true"),) * _ROUNDS,
)
"""Besides what sandboxes do first: the file system's own work after a boot, some five seconds."""
_SETTLE_SEC: Final = 1.0
"""For connections to close and timers to run: what is pending, every restored guest does first."""
MOST_BOOTED_MB: Final = 512
"""More of its memory a guest that boots does not use (measured: 130 of 512, with the warm-up)."""
_PREPARATION: Final = "3"
"""Changes with the preparation, so that variants are made anew."""


class Variants:
    """Finds or makes the snapshot of a template for a size; one maker at a time for each."""

    def __init__(self, context: HostContext) -> None:
        self._context = context
        self._making: dict[ImageId, asyncio.Task[Manifest]] = {}
        self._unfit: set[ImageId] = set()

    async def get(self, cold: Manifest, size: Size) -> Manifest:
        """The variant of a template for a size; whoever comes while it is made waits for it.

        Raises `HostFailure` where it cannot be made, `NoCapacity` where there is no room for it.
        """
        return (await self._find(cold, size))[0]

    async def _find(self, cold: Manifest, size: Size) -> tuple[Manifest, bool]:
        kernel = cold.files[form.KERNEL].sha256
        hardware = profile(self._context, size.vcpus, size.memory_mb, kernel)
        for number in itertools.count():
            image_id = _variant_id(cold, hardware, number)
            if image_id in self._unfit:
                continue
            try:
                found = await asyncio.to_thread(self._open, image_id)
            except NotFound:
                break
            except IncompatibleImage as error:
                _log.error("a warm snapshot is damaged", image=image_id, error=error.message)
            else:
                if found.machine is not None and not differences(found.machine, hardware):
                    return found, False
            self._unfit.add(image_id)
        task = self._making.get(image_id)
        if task is None:
            name = f"variant {cold.name} {size.vcpus}x{size.memory_mb}"
            task = asyncio.create_task(self._make(cold, hardware, image_id), name=name)
            self._making[image_id] = task
            task.add_done_callback(lambda _: self._making.pop(image_id, None))
        return await asyncio.shield(task), True

    async def startable(self, image_id: ImageId, size: Size) -> tuple[Manifest, bool]:
        """The snapshot to continue: the image itself, or a template's for the size.

        And whether a guest was booted for it meanwhile.

        Raises what `get` does, `NotFound` and `IncompatibleImage`.
        """
        store = self._context.store
        image = await asyncio.to_thread(store.open, image_id)
        if not image.is_cold:
            return await asyncio.to_thread(store.open_sound, image_id), False
        return await self._find(image, size)

    def _open(self, image_id: ImageId) -> Manifest:
        self._context.store.use(image_id)
        return self._context.store.open_sound(image_id)

    async def close(self) -> None:
        """Give up what is being made."""
        tasks = list(self._making.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _make(self, cold: Manifest, hardware: HardwareProfile, image_id: ImageId) -> Manifest:
        with self._context.stages.of("template"):
            return await self._made(cold, hardware, image_id)

    async def _made(self, cold: Manifest, hardware: HardwareProfile, image_id: ImageId) -> Manifest:
        store = self._context.store
        log = _log.bind(template=cold.name, vcpus=hardware.vcpus, memory_mb=hardware.memory_mb)
        needed_mb = min(hardware.memory_mb, MOST_BOOTED_MB)
        await asyncio.to_thread(admission.require_disk, self._context.settings, needed_mb)
        log.info("making a warm snapshot")
        async with AsyncExitStack() as stack:
            made = stack.enter_context(store.staging())
            source = LaunchSource(
                image=cold,
                vcpus=hardware.vcpus,
                memory_mb=hardware.memory_mb,
                disk=store.below(cold),
            )
            machine = await Machine.boot(self._context, source, _MEMORY)
            stack.push_async_callback(machine.release)
            await self._warm_up(machine)
            await machine.store(made)
            files = machine.spec.files
            await asyncio.to_thread(take, files.directory / _MEMORY, made / form.MEMORY)
            await asyncio.to_thread(take, files.overlay, made / _LAYER)
            await machine.release()
            await asyncio.to_thread(_write_disk, self._context.driver.disk_format, made, cold)
            manifest = await asyncio.to_thread(
                _describe, made, cold, machine.record, hardware, image_id
            )
            published = await asyncio.to_thread(store.publish, made, manifest)
        log.info("made a warm snapshot", image=image_id)
        return published

    async def _warm_up(self, machine: Machine) -> None:
        """Let the guest do once what every sandbox does first, so that nobody waits for it.

        That includes an identity, with a token which the next one replaces. Each has a name of its
        own, as sandboxes do, so that files are written.
        """
        if not self._context.driver.capabilities.own_kernel:
            await machine.initialize_guest(_HOSTNAME)
            return
        for number in range(_ROUNDS):
            await machine.initialize_guest(f"{_HOSTNAME}{number}")
        for command in _WARM_UP:
            try:
                await machine.guest.exec(command, timeout=patience(_WARM_UP_SEC), output_limit=4096)
            except WrennError as error:
                raise HostFailure(
                    "The template could not be prepared", detail=f"{command.cmd}: {error}"
                ) from error
        machine.client.close()
        await asyncio.sleep(_SETTLE_SEC)


def _write_disk(disk_format: DiskFormat, made: Path, cold: Manifest) -> None:
    """Make the image's disk of the machine's layer; it finds its base wherever both are."""
    disk_format.merge((made / _LAYER,), made / form.DISK, disk_beside(cold), cold.disk_size)
    (made / _LAYER).unlink()


def _variant_id(cold: Manifest, hardware: HardwareProfile, number: int) -> ImageId:
    """Facts that differ a little from start to start, such as the clock's rate, are rounded.

    `number` counts those that were found damaged.
    """
    facts = [
        f"{field}={getattr(hardware, field)}"
        for field in hardware.__struct_fields__
        if field != "tsc_khz"
    ]
    facts.append(f"tsc_mhz={round(hardware.tsc_khz / 1000)}")
    if number:
        facts.append(f"number={number}")
    return form.derived_id({}, "variant", _PREPARATION, cold.image_id, *facts)


def _describe(
    made: Path, cold: Manifest, record: Record, hardware: HardwareProfile, image_id: ImageId
) -> Manifest:
    if (made / form.MEMORY).stat().st_size != hardware.memory_mb << 20:
        raise HostFailure("The template could not be prepared", detail="size of its memory")
    names = (form.VMSTATE, form.MEMORY, form.DISK)
    return Manifest(
        image_id=image_id,
        created_at=form.now(),
        name=cold.name,
        recipe_sha256=cold.recipe_sha256,
        files={name: form.describe(made / name) for name in names},
        kernel_args=cold.kernel_args,
        vcpus=hardware.vcpus,
        memory_mb=hardware.memory_mb,
        disk_mb=cold.disk_mb,
        base_image_id=cold.image_id,
        variant=True,
        token=record.token,
        machine=hardware,
    )
