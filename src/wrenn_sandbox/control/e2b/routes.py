"""All routes of E2B's API; those with a name in the path before those with an id there."""

from . import logs, metrics, network, sandboxes, snapshots, teams

ROUTERS = (
    metrics.router,
    sandboxes.router,
    logs.router,
    network.router,
    snapshots.router,
    teams.router,
)
