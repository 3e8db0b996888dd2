"""What runs in a sandbox and what it uses: `/v1/sandboxes/{id}/processes` and `metrics`."""

from .fields import NullableText, Response


class Process(Response):
    pid: int
    tag: NullableText = None
    cmd: str
    args: list[str]


class ProcessList(Response):
    processes: list[Process]


class SandboxMetrics(Response):
    """Use of resources inside a sandbox now; sizes in bytes.

    `mem_limit` and `process_limit` are what all commands together may use.
    """

    cpu_count: int
    cpu_used_pct: float
    mem_total: int
    mem_used: int
    mem_cache: int
    disk_used: int
    disk_total: int
    mem_limit: int | None
    process_count: int | None
    process_limit: int | None
