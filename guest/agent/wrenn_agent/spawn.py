"""Starting a program: PATH lookup, pipes or a terminal, rights of the user; no fork.

`posix_spawn` shares the agent's memory until the program is executed, so a start does not get
slower as the agent grows. What it cannot do itself (directory, user, OOM score, control group) the
agent takes on for the moment of the call.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import termios
from contextlib import nullcontext

from .errors import (
    AgentError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    from_os_error,
)
from .loop import report
from .users import ActingAs, User

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cgroups import CommandGroup, CommandGroups

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
Actions = list[tuple[int | str, ...]]
"""What posix_spawn does to the new process's file descriptors."""
OWN_PROGRAMS = ("archive",)
"""What `main.py` takes as its first argument, besides what starts the agent itself."""
AGENT_OOM_SCORE, COMMAND_OOM_SCORE = b"-1000", b"500"
_IUTF8 = 0x4000
_RESET_SIGNALS = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM]


class Command:
    """A program to run: `cwd` is absolute, `envs` everything, `given_envs` the caller's part."""

    __slots__ = ("argv", "cwd", "envs", "given_envs", "size", "stdin", "user")

    def __init__(
        self,
        argv: list[str],
        envs: dict[str, str],
        given_envs: dict[str, str],
        cwd: str,
        user: User,
        stdin: bool,
        size: tuple[int, int] | None,
    ) -> None:
        self.argv = argv
        self.envs = envs
        self.given_envs = given_envs
        self.cwd = cwd
        self.user = user
        self.stdin = stdin
        """Whether standard input is a pipe; else it is empty."""
        self.size = size
        """Columns and rows of the terminal to run on, None for pipes."""


class Spawned:
    """A started program: its pid and the agent's ends of its pipes or terminal, non-blocking."""

    __slots__ = ("group", "input", "outputs", "pid")

    def __init__(
        self,
        pid: int,
        group: CommandGroup | None,
        input_fd: int | None,
        outputs: dict[int, str],
    ) -> None:
        self.pid = pid
        self.group = group
        """The control group that it was born in; None outside of a VM."""
        self.input = input_fd
        self.outputs = outputs
        """File descriptor to channel."""


class Spawner:
    """Starts commands; `guard_memory`: they get an OOM score of their own (needs privileges).

    With `groups` each command gets a control group.
    """

    def __init__(self, guard_memory: bool, groups: CommandGroups | None = None) -> None:
        self._groups = groups
        self._null = os.open(os.devnull, os.O_RDWR)
        self._oom_score: int | None = None
        if guard_memory:
            try:
                score = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
                os.pwrite(score, AGENT_OOM_SCORE, 0)
                self._oom_score = score
            except OSError as error:
                report(error)  # the first process of a machine goes on, whatever happens

    def spawn(self, command: Command) -> Spawned:
        """Start `command` in a session of its own.

        Raises NotFound (no such command), PermissionDenied (not executable), InvalidArgument
        (working directory, NUL bytes, arguments too long) or ResourceExhausted.
        """
        opened: list[int] = []  # closed in any case: the program's ends
        kept: list[int] = []  # closed on failure: the agent's ends
        group: CommandGroup | None = None
        try:
            with self._groups or nullcontext() as group, ActingAs(command.user):
                actions, input_fd, outputs = (
                    self._pipes(command, opened, kept)
                    if command.size is None
                    else self._terminal(command.size, opened, kept)
                )
                pid = self._execute(command, actions)
        except (OSError, AgentError) as error:
            for fd in kept:
                os.close(fd)
            if group is not None:
                group.release()
            if isinstance(error, OSError):
                raise from_os_error(error, "cannot start process") from error
            raise
        finally:
            for fd in opened:
                os.close(fd)
        return Spawned(pid, group, input_fd, outputs)

    def _pipes(
        self, command: Command, opened: list[int], kept: list[int]
    ) -> tuple[Actions, int | None, dict[int, str]]:
        stdin, input_fd = self._null, None
        if command.stdin:
            stdin, input_fd = os.pipe()
            opened.append(stdin)
            kept.append(input_fd)
            os.set_blocking(input_fd, False)
        outputs: dict[int, str] = {}
        actions: Actions = [(os.POSIX_SPAWN_DUP2, stdin, 0)]
        for number, channel in ((1, "stdout"), (2, "stderr")):
            ours, theirs = os.pipe()
            kept.append(ours)
            opened.append(theirs)
            os.set_blocking(ours, False)
            outputs[ours] = channel
            actions.append((os.POSIX_SPAWN_DUP2, theirs, number))
        return actions, input_fd, outputs

    def _terminal(
        self, size: tuple[int, int], opened: list[int], kept: list[int]
    ) -> tuple[Actions, int, dict[int, str]]:
        master, slave = os.openpty()
        kept.append(master)
        opened.append(slave)
        _expect_utf8(slave)
        resize(master, size)
        os.set_blocking(master, False)
        # opened by the leader of a new session it becomes that session's terminal
        actions: Actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.ttyname(slave), os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_DUP2, 0, 2),
        ]
        return actions, master, {master: "pty"}

    def _execute(self, command: Command, actions: Actions) -> int:
        try:
            os.chdir(command.cwd)
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"working directory {command.cwd!r} cannot be used") from error
        try:
            program = find_program(command.argv[0], command.envs.get("PATH", DEFAULT_PATH))
            self._set_oom_score(COMMAND_OOM_SCORE)
            return os.posix_spawn(
                program,
                command.argv,
                command.envs,
                file_actions=actions,
                setsid=True,
                setsigmask=[],
                setsigdef=_RESET_SIGNALS,
            )
        except OSError as error:
            raise _spawn_error(error, command.argv[0]) from error
        except ValueError as error:
            raise InvalidArgument(f"command cannot be passed on: {error}") from error
        finally:
            self._set_oom_score(AGENT_OOM_SCORE)
            os.chdir("/")

    def _set_oom_score(self, score: bytes) -> None:
        if self._oom_score is not None:
            os.pwrite(self._oom_score, score, 0)


def own_program(name: str) -> list[str]:
    """The command line of a program that comes with the agent, up to its arguments.

    It runs on the agent's own interpreter, which was started as this process's command line says.
    """
    if name not in OWN_PROGRAMS:
        raise InvalidArgument(f"there is no program {name!r}")
    with open("/proc/self/cmdline", "rb") as file:
        argv = os.fsdecode(file.read()).split("\0")
    script = next(at for at, each in enumerate(argv) if each.endswith("main.py"))
    return [*argv[: script + 1], name]


def find_program(name: str, path: str) -> str:
    """The file to execute for `name`, looked up as a shell does; relative to the current directory.

    Raises NotFound, or PermissionDenied when there are only files that are not executable.
    """
    if "/" in name:
        candidates = [name]
    else:
        candidates = [f"{folder or '.'}/{name}" for folder in path.split(":")]
    for candidate in candidates:  # most are not there: no exception for each of these
        if os.access(candidate, os.X_OK) and os.path.isfile(candidate):
            return candidate
    if any(os.path.exists(candidate) for candidate in candidates):
        raise PermissionDenied(f"command {name!r} is not executable")
    raise NotFound(f"command {name!r} not found")


def _expect_utf8(terminal: int) -> None:
    """Let the terminal erase whole characters, however many bytes they have."""
    attributes = termios.tcgetattr(terminal)
    attributes[0] |= _IUTF8
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)


def resize(terminal: int, size: tuple[int, int]) -> None:
    """Set columns and rows of a terminal."""
    columns, rows = size
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _spawn_error(error: OSError, name: str) -> AgentError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"command {name!r} or its interpreter not found")
    if error.errno in (errno.EACCES, errno.EPERM, errno.ENOEXEC, errno.ELIBBAD, errno.EISDIR):
        return PermissionDenied(f"command {name!r} is not executable")
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return ResourceExhausted("no process can be started: out of processes or memory")
    return from_os_error(error, f"cannot start {name!r}")
