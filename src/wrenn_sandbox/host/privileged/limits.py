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

    def argv(self) -> list[str]:
        """The argv prefix that sets them.

        Set by the process itself, while it may: a root without `CAP_SYS_RESOURCE`, as in
        containers, cannot limit a process that has become another user.
        """
        wanted = [
            ("nofile", resource.RLIMIT_NOFILE, self.files),
            ("fsize", resource.RLIMIT_FSIZE, self.file_size),
            ("as", resource.RLIMIT_AS, self.address_space),
            ("nproc", resource.RLIMIT_NPROC, self.threads),
            ("core", resource.RLIMIT_CORE, 0),
            ("memlock", resource.RLIMIT_MEMLOCK, 0),
            ("msgqueue", resource.RLIMIT_MSGQUEUE, 0),
        ]
        options = []
        for name, number, value in wanted:
            if value is not None:
                _, ceiling = resource.getrlimit(number)
                bound = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
                options.append(f"--{name}={bound}:{bound}")
        return ["prlimit", *options, "--"]
