"""The templates of this host: built from recipes and OCI images, kept in the image store."""

import asyncio
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
from rich.console import Console

from wrenn_sandbox.errors import Conflict
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.host.builds.image import root_of
from wrenn_sandbox.host.builds.pull import Access, Pull
from wrenn_sandbox.host.builds.reference import parse as reference_of
from wrenn_sandbox.host.images.build import Step, build_template
from wrenn_sandbox.host.images.recipe import check_name, load
from wrenn_sandbox.host.images.store import ImageStore, NamedImage
from wrenn_sandbox.host.paths import Paths, guest_files
from wrenn_sandbox.settings import HostSettings

from . import output

_PARTS = "minimal"
"""The recipe whose kernel, runtime image and sizes a template of an OCI image gets."""


def build(
    name: str,
    recipe: Path | None = None,
    mirror: str | None = None,
    image: str | None = None,
    access: Access | None = None,
) -> None:
    """Build the template `name` and tell of each step."""
    reference = None if image is None else reference_of(image)
    path = recipe or guest_files().recipe(_PARTS if reference else check_name(name))
    wanted = msgspec.structs.replace(load(path), name=check_name(name))
    settings = HostSettings()
    paths = Paths(settings.data_dir)
    console = Console(highlight=False)

    def tell(step: Step) -> None:
        console.print(_line(step), markup=False)

    with console.status(f"building {name}"), ExitStack() as stack:
        root = None
        if reference is not None:
            began = time.monotonic()
            pull = Pull(
                paths,
                access or Access(),
                limit_mb=wanted.machine.disk_mb,
                reserve_mb=settings.disk_reserve_mb,
                kept_mb=settings.layers_mb,
            )
            root = stack.enter_context(root_of(reference, pull))
            tell(Step("fetch", time.monotonic() - began))
        manifest = build_template(
            wanted, ImageStore(paths), paths, progress=tell, mirror=mirror, root=root
        )
        began = time.monotonic()
        if asyncio.run(_warm(settings, wanted.name)):
            tell(Step("boot, warm up, snapshot", time.monotonic() - began, cached=False))
        else:
            console.print("a server is running: it boots the template when it is first asked for")
    console.print(f"template {name} is image {manifest.image_id}", markup=False)


def build_of_image(
    name: str,
    image: str,
    recipe: Path | None,
    mirror: str | None,
    *,
    authfile: Path | None,
    cert_dir: Path | None,
    insecure: bool,
) -> None:
    """Build the template `name` of an OCI image and tell of each step."""
    build(name, recipe, mirror, image, Access(authfile, cert_dir, insecure))


async def _warm(settings: HostSettings, template: str) -> bool:
    """Make the template's snapshot here; False where a server has the data directory."""
    try:
        host = await HostAgent.start(settings)
    except Conflict:
        return False
    try:
        await host.warm(template)
    finally:
        await host.close()
    return True


def show(json: bool) -> None:
    """Print the templates of this host."""
    found = ImageStore(Paths(HostSettings().data_dir)).templates()
    rows = [_row(each) for each in found]
    output.show(rows, "name image_id vcpus memory_mb disk_mb size created_at source", json=json)


class _Row(msgspec.Struct):
    name: str
    image_id: str
    vcpus: int
    memory_mb: int
    disk_mb: int
    size: int
    created_at: str
    source: str


def _row(template: NamedImage) -> _Row:
    manifest = template.manifest
    return _Row(
        name=template.name,
        image_id=manifest.image_id,
        vcpus=manifest.vcpus,
        memory_mb=manifest.memory_mb,
        disk_mb=manifest.disk_mb,
        size=template.size,
        created_at=manifest.created_at.isoformat().replace("+00:00", "Z"),
        source=manifest.source or "recipe",
    )


def _line(step: Step) -> str:
    spent = "unchanged" if step.cached else f"{step.seconds:.1f} s"
    return f"{step.name:<28} {spent:>9}"
