"""The parts of the control plane, put together and run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from argon2 import PasswordHasher

from wrenn_sandbox.control.api.services import Services
from wrenn_sandbox.control.oauth.registry import open_providers
from wrenn_sandbox.control.oauth.state import States
from wrenn_sandbox.control.outbound import Caller, http_client
from wrenn_sandbox.control.service.accounts import AccountService
from wrenn_sandbox.control.service.activity import Activity
from wrenn_sandbox.control.service.api_keys import ApiKeyService
from wrenn_sandbox.control.service.autopause import AutoPause
from wrenn_sandbox.control.service.callers import Revocations
from wrenn_sandbox.control.service.calls import ConcurrencyLimiter
from wrenn_sandbox.control.service.context import ControlContext
from wrenn_sandbox.control.service.deadlines import Deadlines
from wrenn_sandbox.control.service.deliveries import AT_ONCE, Deliveries
from wrenn_sandbox.control.service.draining import Draining
from wrenn_sandbox.control.service.evacuation import Evacuation
from wrenn_sandbox.control.service.events import EventFeed
from wrenn_sandbox.control.service.forks import Forks
from wrenn_sandbox.control.service.guest_health import GuestHealth
from wrenn_sandbox.control.service.guests import GuestService
from wrenn_sandbox.control.service.history import HistoryService
from wrenn_sandbox.control.service.host_events import HostEvents
from wrenn_sandbox.control.service.idempotency import Idempotency
from wrenn_sandbox.control.service.images import DiscardedImages
from wrenn_sandbox.control.service.injections import Injections
from wrenn_sandbox.control.service.lifecycle import Lifecycle
from wrenn_sandbox.control.service.network import NetworkPolicies
from wrenn_sandbox.control.service.oauth import OAuthService
from wrenn_sandbox.control.service.passwords import Passwords
from wrenn_sandbox.control.service.ports import PortService
from wrenn_sandbox.control.service.rate_limits import AttemptLimits
from wrenn_sandbox.control.service.reconciler import Reconciler
from wrenn_sandbox.control.service.sandboxes import SandboxService
from wrenn_sandbox.control.service.secrets import SecretService
from wrenn_sandbox.control.service.snapshots import SnapshotService
from wrenn_sandbox.control.service.stop import PauseAtStop
from wrenn_sandbox.control.service.templates import Templates
from wrenn_sandbox.control.service.tokens import Tokens, load_or_make_secret
from wrenn_sandbox.control.service.vault import Vault
from wrenn_sandbox.control.service.webhooks import WebhookService
from wrenn_sandbox.ids import new_installation_id
from wrenn_sandbox.model.sandbox import Status
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import ControlSettings
from wrenn_sandbox.wire.host import Host

from .clock import Clock
from .store import Store


class ControlPlane:
    """Everything between the routes and the host."""

    def __init__(
        self,
        settings: ControlSettings,
        host: Host,
        *,
        clock: Clock,
        hasher: PasswordHasher | None,
    ) -> None:
        context = ControlContext(settings, Store(settings.sql_url, settings.quota), host, clock)
        self._context = context
        self._settings = settings
        self.store = context.store
        self.metrics = context.metrics
        self.store.report_faults(self.metrics.database_error)
        self.operations = context.operations
        self.activity = Activity(self.store, clock)
        self.draining = Draining(self.store, self.metrics)
        self.passwords = Passwords(hasher)
        self.api_keys = ApiKeyService(context, self.activity)
        self.revocations = Revocations(self.store)
        self.injections = Injections(context)
        self.lifecycle = Lifecycle(context, self.activity, self.draining, self.injections)
        self.health = GuestHealth(context)
        self.events = EventFeed(context)
        self.deliveries = Deliveries(context)
        self.webhooks = WebhookService(context, self.deliveries)
        images = DiscardedImages(self.store, host)
        templates = Templates(self.store, host)
        policies = NetworkPolicies(context, self.injections)
        calls = ConcurrencyLimiter(
            per_sandbox=settings.calls_per_sandbox, per_team=settings.calls_per_team
        )
        forks = Forks(context, self.lifecycle, self.draining, images)
        self.sandboxes = SandboxService(
            context, self.lifecycle, templates, self.activity, policies, forks
        )
        self.guests = GuestService(context, self.activity, calls, self.health)
        self.history = HistoryService(context, calls)
        self.snapshots = SnapshotService(context, templates, images)
        self.idempotency = Idempotency(context)
        self.secrets = SecretService(context, self.injections, policies)
        self.reconciler = Reconciler(context, self.lifecycle, images, policies, self.injections)
        self.host_events = HostEvents(context)
        self.pause_at_stop = PauseAtStop(context, self.lifecycle)
        self.evacuation = Evacuation(context, self.lifecycle, self.draining)
        self.deadlines = Deadlines(context, self.lifecycle)
        self.autopause = AutoPause(context, self.lifecycle, self.activity)

    async def _claim_host(self) -> None:
        owner = await self.store.installation.identity(new_installation_id())
        counts = await self.store.all_sandboxes.count_by_status()
        alive = sum(counts.get(each, 0) for each in (Status.RUNNING, Status.PAUSED))
        await self._context.host.claim(owner, expected=alive > 0)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Services]:
        """The services, as long as the block lasts.

        At its end what is under way gets `shutdown_grace_sec` seconds, then the background tasks
        end, sandboxes are paused if the settings say so, and what is kept in memory is written.
        Raises `Conflict` where the host's sandboxes are another database's, or the database's
        another host's.
        """
        await self.store.open()
        try:
            await self._claim_host()
            await self.draining.refresh()
            async with self._services() as services, asyncio.TaskGroup() as background:
                tasks = [
                    background.create_task(each.run())
                    for each in (
                        self.reconciler,
                        self.host_events,
                        self.autopause,
                        self.deadlines,
                        self.activity,
                        self.revocations,
                        self.draining,
                        self.evacuation,
                        self.health,
                        self.events,
                        self.deliveries,
                    )
                ]
                try:
                    yield services
                finally:
                    await self.operations.close(patience(self._settings.shutdown_grace_sec))
                    await self.idempotency.close(patience(self._settings.shutdown_grace_sec))
                    for task in tasks:
                        task.cancel()
            if self._settings.on_stop == "pause":
                await self.pause_at_stop.run()
                await self.operations.close(patience(self._settings.shutdown_grace_sec))
            await self.activity.save()
        finally:
            await self.store.close()

    @asynccontextmanager
    async def _services(self) -> AsyncIterator[Services]:
        await self.passwords.prepare()
        secret = await self._secret()
        self.injections.use(await self._vault())
        limits = AttemptLimits(
            per_email=self._settings.auth_attempts,
            per_address=self._settings.auth_attempts_per_address,
        )
        accounts = AccountService(
            self._context, self.passwords, Tokens(secret, self._context.clock), limits
        )
        async with open_providers(self._settings) as providers, self._outbound():
            states = States(secret, clock=self._context.clock)
            ports = PortService(self._context, self.guests, self.lifecycle, secret)
            try:
                yield Services(
                    accounts,
                    self.api_keys,
                    self.sandboxes,
                    self.snapshots,
                    self.idempotency,
                    self.guests,
                    self.history,
                    OAuthService(self._context, accounts, limits, providers, states),
                    self.revocations,
                    self.draining,
                    self.events,
                    self.webhooks,
                    ports,
                    self.secrets,
                )
            finally:
                await ports.close()

    @asynccontextmanager
    async def _outbound(self) -> AsyncIterator[None]:
        """The way to webhooks: no proxy, and a connection for each delivery."""
        timeout = self._settings.webhook_timeout_sec
        async with http_client(timeout, connections=AT_ONCE, idle=0, trust_env=False) as client:
            caller = Caller(client, self._settings.webhook_networks, timeout)
            async with self.deliveries.through(caller):
                yield

    async def _secret(self) -> str:
        if self._settings.jwt_secret is not None:
            return self._settings.jwt_secret.get_secret_value()
        path = self._settings.data_dir / "jwt_secret"
        return await asyncio.to_thread(load_or_make_secret, path, "which logs everyone out")

    async def _vault(self) -> Vault:
        if self._settings.secrets_key is not None:
            return Vault(self._settings.secrets_key.get_secret_value())
        path = self._settings.data_dir / "secrets_key"
        lost = "after which the values of all secrets have to be set again"
        return Vault(await asyncio.to_thread(load_or_make_secret, path, lost))
