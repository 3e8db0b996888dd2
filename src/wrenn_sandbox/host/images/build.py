"""Builds a template: root disk, kernel, first file system, runtime image, manifest.

What needs the network (`packages`) is kept in a cache by the digest of its inputs, so that a
rebuild after a change of the agent takes a second. The same inputs give the same bytes and the
same image id; an unchanged rebuild changes nothing.
"""

import errno
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import msgspec

from wrenn_sandbox.errors import HostFailure, NoSpace
from wrenn_sandbox.host.paths import GuestFiles, Paths, guest_files

from . import accounts, disk, initrd, manifest, modules, packages, runtime
from .cache import StepCache
from .manifest import Defaults, Manifest
from .recipe import Recipe
from .staging import exclusive
from .store import ImageStore

_CACHE_FORMAT = "2"
_PARALLEL = 3
_KERNEL_MODULES = (initrd, modules)
"""What the kernel's step keeps is in a form of theirs."""


@dataclass(frozen=True)
class Step:
    """A finished step: its name, how many seconds it took, whether its result was kept before."""

    name: str
    seconds: float
    cached: bool = False


Progress = Callable[[Step], None]


@dataclass(frozen=True)
class Root:
    """A root disk that comes from elsewhere than the recipe's packages.

    `make` makes the disk, of so many MiB, as a file that does not exist, alone in its directory.
    The same `digest` gives the same disk. `source` and `defaults` are for the manifest.
    """

    digest: str
    source: str
    defaults: Defaults
    make: Callable[[Path, int], None]


def build_template(
    recipe: Recipe,
    store: ImageStore,
    paths: Paths,
    *,
    progress: Progress,
    mirror: str | None = None,
    guest: GuestFiles | None = None,
    root: Root | None = None,
) -> Manifest:
    """Builds the recipe's template, lets its name stand for it and returns its manifest.

    With `root` its disk is that one; kernel, runtime image and sizes are still the recipe's.

    Blocks, for half a minute when nothing is cached. Waits while the same name is being built.
    Raises HostFailure, NoSpace or InvalidRequest; nothing but cached steps is left then.
    `progress` is called from several threads, one call at a time.
    """
    packages.check_mirror(mirror)
    with host_errors():
        paths.prepare()
        store.sweep()
        with exclusive(paths.build_lock(recipe.name)):
            build = _Build(recipe, paths, mirror, guest or guest_files(), progress, root)
            return build.run(store)


class _Build:
    def __init__(
        self,
        recipe: Recipe,
        paths: Paths,
        mirror: str | None,
        guest: GuestFiles,
        report: Progress,
        root: Root | None,
    ) -> None:
        self._recipe = recipe
        self._root = root
        self._mirror = mirror
        self._guest = guest
        self._report = report
        self._report_lock = threading.Lock()
        self._cache = StepCache(paths.cache)

    def run(self, store: ImageStore) -> Manifest:
        recipe = self._recipe
        files = msgspec.json.encode(disk.GUEST_FILES, order="sorted").decode()
        steps = (
            self._disk_step(files),
            (
                "kernel",
                (msgspec.json.encode(recipe.kernel).decode(), *map(_source, _KERNEL_MODULES)),
                self._make_kernel,
            ),
            ("runtime", recipe.runtime.packages, self._make_runtime),
        )
        with ThreadPoolExecutor(_PARALLEL) as pool:
            parts = list(pool.map(lambda step: self._cached(*step), steps))
        with store.staging() as made:
            return self._assemble(store, made, *parts)

    def _disk_step(self, files: str) -> tuple[str, tuple[str, ...], Callable[[Path], None]]:
        size = str(self._recipe.machine.disk_mb)
        if self._root is not None:
            return "image", (self._root.digest, size, files), self._make_disk_of_root
        inputs = (*self._recipe.packages, size, files)
        account = self._recipe.account
        inputs = inputs if account is None else (*inputs, account, _source(accounts))
        return "disk", inputs, self._make_disk

    def _assemble(
        self, store: ImageStore, made: Path, root: Path, kernel: Path, base: Path
    ) -> Manifest:
        with self._timed("agent and init"), store.staging() as scratch:
            tree = scratch / "tree"
            runtime.add_agent(base, self._guest.agent, tree)
            runtime.add_modules(kernel / modules.TREES, kernel / "busybox", tree)
            if self._root is not None:
                runtime.add_defaults(self._root.defaults, tree)
            runtime.make_image(tree, made / manifest.RUNTIME)
            initrd.make_initrd(kernel, self._guest.init, made / manifest.INITRD)
            os.link(kernel / "kernel", made / manifest.KERNEL)
            os.link(root / "disk", made / manifest.DISK)
        with self._timed("digests"):
            described = self._describe(made)
        with self._timed("store"):
            return store.publish(made, described, name=self._recipe.name)

    def _describe(self, made: Path) -> Manifest:
        recipe, machine = self._recipe, self._recipe.machine
        files = {path.name: manifest.describe(path) for path in sorted(made.iterdir())}
        sizes = (machine.vcpus, machine.memory_mb, machine.disk_mb)
        return Manifest(
            image_id=manifest.derived_id(
                files, recipe.name, recipe.digest, initrd.KERNEL_ARGS, *map(str, sizes)
            ),
            created_at=manifest.now(),
            name=recipe.name,
            recipe_sha256=recipe.digest,
            files=files,
            kernel_args=initrd.KERNEL_ARGS,
            vcpus=machine.vcpus,
            memory_mb=machine.memory_mb,
            disk_mb=machine.disk_mb,
            source="" if self._root is None else self._root.source,
            defaults=None if self._root is None else self._root.defaults,
        )

    # Cached steps: each fills an empty directory.

    def _make_disk(self, made: Path) -> None:
        archive = made / "root.tar"
        with self._timed("packages of the root disk"):
            packages.install(self._recipe.suite, self._recipe.packages, self._mirror, archive)
        with self._timed("root disk"):
            disk.add_files(archive, disk.GUEST_FILES)
            if self._recipe.account is not None:
                accounts.add(archive, self._recipe.account)
            disk.make_disk(archive, self._recipe.machine.disk_mb, made / "disk")
            archive.unlink()

    def _make_disk_of_root(self, made: Path) -> None:
        assert self._root is not None
        with self._timed("root disk"):
            self._root.make(made / "disk", self._recipe.machine.disk_mb)

    def _make_kernel(self, made: Path) -> None:
        kernel = self._recipe.kernel
        with self._timed("kernel"), self._unpacked(made, kernel.package, kernel.busybox) as root:
            initrd.extract(root, kernel, made)

    def _make_runtime(self, made: Path) -> None:
        wanted = self._recipe.runtime.packages
        with self._timed("interpreter"), self._unpacked(made, *wanted) as root:
            runtime.make_base(root, made)

    @contextmanager
    def _unpacked(self, made: Path, *wanted: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=made) as work:
            root = Path(work, "packages")
            packages.unpack(self._recipe.suite, wanted, self._mirror, root)
            yield root

    def _cached(self, step: str, inputs: tuple[str, ...], make: Callable[[Path], None]) -> Path:
        sources = (_CACHE_FORMAT, self._recipe.suite, self._mirror or "")
        path, cached = self._cache.get(step, (*sources, *inputs), make)
        if cached:
            self._say(Step(step, 0.0, cached=True))
        return path

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._say(Step(name, time.monotonic() - start))

    def _say(self, step: Step) -> None:
        with self._report_lock:
            self._report(step)


def _source(module: ModuleType) -> str:
    """A digest of a module's code."""
    assert module.__file__ is not None
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()


@contextmanager
def host_errors() -> Iterator[None]:
    """Tells what goes wrong with files in the words of HostFailure and NoSpace."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("The disk of this host is full", detail=str(error)) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise HostFailure(
                "The data directory cannot be written by this user", detail=str(error)
            ) from error
        raise HostFailure("The template could not be stored", detail=str(error)) from error
