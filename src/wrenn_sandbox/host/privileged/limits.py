"""What the kernel holds a monitor's process to, whatever it does."""

import resource
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds; sizes are bytes, None leaves what the server has.

    `threads` counts those of all processes of the user, so it is for users of their own only.
    """

    files: int = 4096
    file_size: int | None = None
    address_space: int | None = None
    threads: int | None = None

    def apply(self, pid: int) -> None:
        """Bind this process to them; raises OSError, such as for one that has ended.

        Without `CAP_SYS_RESOURCE`, as in containers, only a thread of the same user may: one that
        has started the process after `become`.
        """
        wanted = [
            (resource.RLIMIT_NOFILE, self.files),
            (resource.RLIMIT_FSIZE, self.file_size),
            (resource.RLIMIT_AS, self.address_space),
            (resource.RLIMIT_NPROC, self.threads),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ]
        for number, value in wanted:
            if value is not None:
                _, ceiling = resource.getrlimit(number)
                bound = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
                resource.prlimit(pid, number, (bound, bound))
