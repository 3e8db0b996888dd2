"""Durable facts in SQL.

`store.team(id)` gives one team's view: whatever is reached through it belongs to that team.
`store.all_sandboxes`, `store.snapshots`, `store.rollbacks` and `store.keys` see every team and
serve the platform's own work: lifecycle, reconciliation and the check of credentials.
"""

from collections.abc import Callable
from dataclasses import dataclass

from wrenn_sandbox.ids import TeamId
from wrenn_sandbox.model.quota import NO_LIMITS, Quota

from .accounts import Accounts
from .api_keys import ApiKeyDirectory, TeamApiKeys
from .database import UNUSABLE, Database, DatabaseFault, unusable
from .events import AllPolicies, TeamPolicies
from .idempotency import IdempotencyKeys
from .installation import Installation
from .migrate import migrate
from .quotas import QuotaTransaction, TeamQuota
from .rollbacks import Rollbacks
from .sandboxes import AllSandboxes, TeamSandboxes
from .secrets import AllSecrets, TeamSecrets
from .silence import Silences
from .spent_states import SpentStates
from .team_events import AllEvents, TeamEvents
from .templates import Snapshots, TeamTemplates
from .usage import TeamUsage
from .webhooks import AllWebhooks, TeamWebhooks


@dataclass(frozen=True, slots=True)
class TeamStore:
    """What one team owns."""

    team_id: TeamId
    sandboxes: TeamSandboxes
    policies: TeamPolicies
    api_keys: TeamApiKeys
    templates: TeamTemplates
    events: TeamEvents
    webhooks: TeamWebhooks
    secrets: TeamSecrets
    quota: TeamQuota
    usage: TeamUsage


class Store:
    """The control plane's database by its SQLAlchemy URL, and what each team may have."""

    def __init__(self, url: str, quota: Quota = NO_LIMITS) -> None:
        self._database = Database(url)
        self._quota = quota
        self._guard = QuotaTransaction(self._database, quota)
        self.installation = Installation(self._database)
        self.accounts = Accounts(self._database)
        self.spent_states = SpentStates(self._database)
        self.keys = ApiKeyDirectory(self._database)
        self.all_sandboxes = AllSandboxes(self._database, self._guard)
        self.policies = AllPolicies(self._guard)
        self.silences = Silences(self._database, self._guard)
        self.events = AllEvents(self._database)
        self.idempotency_keys = IdempotencyKeys(self._database)
        self.webhooks = AllWebhooks(self._database)
        self.secrets = AllSecrets(self._database)
        self.snapshots = Snapshots(self._database, self._guard)
        self.rollbacks = Rollbacks(self._database, self._guard)

    def team(self, team_id: TeamId) -> TeamStore:
        return TeamStore(
            team_id=team_id,
            sandboxes=TeamSandboxes(self._database, team_id, self._guard),
            policies=TeamPolicies(team_id, self._guard),
            api_keys=TeamApiKeys(self._database, team_id, self._guard),
            templates=TeamTemplates(self._database, team_id, self._guard),
            events=TeamEvents(self._database, team_id),
            webhooks=TeamWebhooks(self._database, team_id, self._guard),
            secrets=TeamSecrets(self._database, team_id, self._guard),
            quota=TeamQuota(self._database, team_id, self._quota),
            usage=TeamUsage(self._database, team_id),
        )

    def listen(self, listener: Callable[[TeamId], None]) -> None:
        """Tell `listener` of each team for which this store has committed something."""
        self._guard.listen(listener)

    def report_faults(self, listener: Callable[[DatabaseFault], None]) -> None:
        """Tell `listener` of each piece of work on the database that fails."""
        self._database.on_fault = listener

    async def open(self) -> None:
        """Make the database ready for use: bring its schema up to date; raises `HostFailure`."""
        try:
            await self._database.prepare()
            await migrate(self._database)
        except UNUSABLE as error:
            raise unusable(error) from error

    async def version(self) -> int | None:
        """See `Database.version`."""
        return await self._database.version()

    async def close(self) -> None:
        await self._database.close()
