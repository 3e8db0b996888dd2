"""Every path that the host side uses, and the permissions of each.

    DATA_DIR/                            0711: a VMM's own uid may pass through, not list
      images/                            0711
      images/<image_id>/                 0755, files 0444: manifest.json and what it names
      templates/<name>.json              0700: which image a template name stands for
      paused/<sandbox_id>/<generation>/  0711: own pages (0600) and disk of a stored sandbox
      engines/<digest>/                  0755, files 0555: a VMM that has stored something
      held/<image_id>                    which images the control plane has given a name
      history/<sandbox_id>/              0700: samples and console of a sandbox, ended ones too
      owner                              0600: which installation the sandboxes here belong to
      run/<machine_id>/                  0711: journal.json, sockets and disk layer of a live VM
      network/                           0700: journal of the network slots
      cache/                             0700: results of template build steps, KVM verdict
      layers/<sha256>                    0700: layers of OCI images, fetched whole
      locks/                             0700: lock files

Nothing else joins a path onto the data directory. Keep its own path short: a Unix socket's may
have 107 bytes.
"""

import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from wrenn_sandbox.ids import ImageId, MachineId, SandboxId

OWNER_ONLY_FILE = 0o600
IMMUTABLE_FILE = 0o444
PROGRAM_FILE = 0o555
PUBLIC_DIRECTORY = 0o755
PASSAGE_DIRECTORY = 0o711
PRIVATE_DIRECTORY = 0o700

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class GuestFiles:
    """The sources of what runs inside a VM, as installed with this package."""

    directory: Path

    @property
    def agent(self) -> Path:
        return self.directory / "agent"

    @property
    def init(self) -> Path:
        return self.directory / "init" / "init"

    def recipe(self, name: str) -> Path:
        """The recipe file of a template that comes with the product."""
        return self.directory / "recipes" / f"{name}.toml"


def guest_files() -> GuestFiles:
    """The guest's sources: inside an installed wheel, else in the repository beside `src`."""
    installed = _PACKAGE / "_guest"
    return GuestFiles(installed if installed.is_dir() else _PACKAGE.parents[1] / "guest")


@dataclass(frozen=True)
class MachineFiles:
    """Files of one live machine, in a directory that belongs to its slot's user."""

    directory: Path
    disk: str = "disk"
    """Name of the writable disk layer: another one where a layer was added while the VM runs."""

    @property
    def journal(self) -> Path:
        return self.directory / "journal.json"

    @property
    def control_socket(self) -> Path:
        """The monitor's control socket."""
        return self.directory / "vmm.sock"

    @property
    def overlay(self) -> Path:
        """The writable disk layer."""
        return self.directory / self.disk

    def above(self, generation: int) -> "MachineFiles":
        """The same with the writable layer that a running VM gets over a generation's disk."""
        return replace(self, disk=f"disk-{generation}")

    @property
    def vmstate(self) -> Path:
        """Where the monitor itself writes device state."""
        return self.directory / "vmstate"

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    @property
    def vmm_log(self) -> Path:
        return self.directory / "vmm.log"

    @property
    def pages_socket(self) -> Path:
        """Where the VMM hands its memory to the page server."""
        return self.directory / "pages.sock"

    @property
    def page_server(self) -> Path:
        """Which process the page server is."""
        return self.directory / "page-server.json"

    @property
    def lost(self) -> Path:
        """Why the server ended the VM while its guest ran, if it did."""
        return self.directory / "lost"


@dataclass(frozen=True)
class Paths:
    """The layout under one data directory."""

    data_dir: Path

    def prepare(self) -> None:
        """Makes the directories with their permissions; harmless when they exist."""
        for path, mode in (
            (self.data_dir, PASSAGE_DIRECTORY),
            (self.images, PASSAGE_DIRECTORY),
            (self.templates, PRIVATE_DIRECTORY),
            (self.engines, PASSAGE_DIRECTORY),
            (self.run, PASSAGE_DIRECTORY),
            (self.paused, PASSAGE_DIRECTORY),
            (self.held, PRIVATE_DIRECTORY),
            (self.histories, PRIVATE_DIRECTORY),
            (self.network, PRIVATE_DIRECTORY),
            (self.cache, PRIVATE_DIRECTORY),
            (self.layers, PRIVATE_DIRECTORY),
            (self.locks, PRIVATE_DIRECTORY),
        ):
            path.mkdir(mode=mode, parents=True, exist_ok=True)
            path.chmod(mode)

    @property
    def images(self) -> Path:
        return self.data_dir / "images"

    @property
    def engines(self) -> Path:
        return self.data_dir / "engines"

    @property
    def templates(self) -> Path:
        return self.data_dir / "templates"

    @property
    def owner(self) -> Path:
        """The id of the installation that the sandboxes here belong to."""
        return self.data_dir / "owner"

    @property
    def run(self) -> Path:
        return self.data_dir / "run"

    @property
    def paused(self) -> Path:
        return self.data_dir / "paused"

    @property
    def held(self) -> Path:
        """One empty file for each image that the control plane has given a name."""
        return self.data_dir / "held"

    @property
    def histories(self) -> Path:
        return self.data_dir / "history"

    @property
    def network(self) -> Path:
        return self.data_dir / "network"

    @property
    def cache(self) -> Path:
        return self.data_dir / "cache"

    @property
    def layers(self) -> Path:
        """What was fetched of OCI images, by SHA-256 in hex."""
        return self.data_dir / "layers"

    @property
    def locks(self) -> Path:
        return self.data_dir / "locks"

    @property
    def server_lock(self) -> Path:
        """Held by the one server that uses this data directory."""
        return self.locks / "server"

    @property
    def images_lock(self) -> Path:
        """Held while images are published, pointed at or collected."""
        return self.locks / "images"

    @property
    def engines_lock(self) -> Path:
        """Held while engines are published, retired or collected."""
        return self.locks / "engines"

    @property
    def installed_engine(self) -> Path:
        """Which engine the VMM that is installed was kept as."""
        return self.cache / "engine.json"

    @property
    def probe_verdict(self) -> Path:
        """What the probe found out about KVM on this machine."""
        return self.cache / "kvm-probe.json"

    def image(self, image_id: ImageId) -> Path:
        return self.images / image_id

    def engine(self, digest: str) -> Path:
        return self.engines / digest

    def template(self, name: str) -> Path:
        return self.templates / f"{name}.json"

    def build_lock(self, name: str) -> Path:
        return self.locks / f"build-{name}"

    def machine(self, machine_id: MachineId) -> MachineFiles:
        return MachineFiles(self.run / machine_id)

    def stored(self, sandbox_id: SandboxId) -> Path:
        """Everything that is kept of a stored sandbox."""
        return self.paused / sandbox_id

    def history(self, sandbox_id: SandboxId) -> Path:
        """What was measured of a sandbox, and what its guest wrote to its console."""
        return self.histories / sandbox_id

    def generation(self, sandbox_id: SandboxId, generation: int) -> Path:
        """Where one pause of a sandbox is kept."""
        return self.paused / sandbox_id / str(generation)


def sync_directory(path: Path) -> None:
    """Makes the entries of a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes, *, mode: int = OWNER_ONLY_FILE) -> None:
    """Replaces a file as a whole: a crash leaves the old content or the new, nothing else."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
