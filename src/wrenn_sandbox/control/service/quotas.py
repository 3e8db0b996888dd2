"""What a team may have of the host, and what it has."""

from wrenn_sandbox.model.quota import Quota
from wrenn_sandbox.settings import QuotaSettings


def quota_of(settings: QuotaSettings) -> Quota:
    """The limits that hold for every team without limits of its own."""
    return Quota(
        running=settings.quota_running,
        vcpus=settings.quota_vcpus,
        memory_mb=settings.quota_memory_mb,
        sandboxes=settings.quota_sandboxes,
        snapshots=settings.quota_snapshots,
        disk_mb=settings.quota_disk_mb,
        api_keys=settings.quota_api_keys,
    )
