"""What runs in a sandbox and what it uses: `/v1/sandboxes/{id}/processes` and `metrics`."""

from typing import Self

from wrenn_sandbox.wire import messages

from .fields import NullableText, Response


class Process(Response):
    pid: int
    tag: NullableText = None
    cmd: str
    args: list[str]


class ProcessList(Response):
    processes: list[Process]

    @classmethod
    def of(cls, processes: list[messages.ProcessInfo]) -> Self:
        return cls(
            processes=[
                Process(pid=each.pid, tag=each.tag, cmd=each.cmd, args=list(each.args))
                for each in processes
            ]
        )


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

    @classmethod
    def of(cls, metrics: messages.GuestMetrics) -> Self:
        return cls(
            cpu_count=metrics.cpu_count,
            cpu_used_pct=metrics.cpu_used_pct,
            mem_total=metrics.mem_total,
            mem_used=metrics.mem_used,
            mem_cache=metrics.mem_cache,
            disk_used=metrics.disk_used,
            disk_total=metrics.disk_total,
            mem_limit=metrics.mem_limit,
            process_count=metrics.process_count,
            process_limit=metrics.process_limit,
        )
