"""What a team can do with its secrets. Their values go in and never out."""

from typing import Final

from wrenn_sandbox.control.store.records import Position, Secret
from wrenn_sandbox.errors import InvalidRequest, NotFound
from wrenn_sandbox.ids import TeamId, new_random, new_secret_id
from wrenn_sandbox.model.sandbox import State
from wrenn_sandbox.model.secrets import InvalidSecret, check_name, check_value, is_name

from .context import ControlContext
from .injections import Injections
from .network import NetworkPolicies

_VERSION_BYTES: Final = 8


class SecretService:
    def __init__(
        self, context: ControlContext, injections: Injections, policies: NetworkPolicies
    ) -> None:
        self._store = context.store
        self._clock = context.clock
        self._injections = injections
        self._policies = policies

    async def create(self, team_id: TeamId, name: str, value: str) -> Secret:
        """Raises `InvalidRequest`, `AlreadyExists` and `QuotaExceeded`."""
        try:
            check_name(name)
        except InvalidSecret as error:
            raise InvalidRequest(f"name: {error}") from error
        _check_value(value)
        now = self._clock()
        secret = Secret(new_secret_id(), team_id, name, b"", _new_version(), now, now)
        sealed = self._injections.vault.seal(value, secret.purpose)
        return await self._store.team(team_id).secrets.add(secret, sealed)

    async def page(
        self, team_id: TeamId, limit: int | None, after: Position | None
    ) -> list[Secret]:
        return await self._store.team(team_id).secrets.page(limit, after)

    async def get(self, team_id: TeamId, name: str) -> Secret:
        """Raises `NotFound`."""
        if not is_name(name):
            raise _not_found()
        for secret in await self._store.team(team_id).secrets.named([name]):
            return secret
        raise _not_found()

    async def replace(self, team_id: TeamId, name: str, value: str) -> Secret:
        """Give a secret another value, from the next requests of running sandboxes on.

        Where a host does not take it now, the reconciler sees to it. Raises `InvalidRequest` and
        `NotFound`.
        """
        _check_value(value)
        secrets = self._store.team(team_id).secrets
        secret = await self.get(team_id, name)
        sealed = self._injections.vault.seal(value, secret.purpose)
        changed = await secrets.replace(secret.id, sealed, _new_version(), self._clock())
        if changed is None:
            raise _not_found()
        await self._policies.renew(await secrets.users(name, [State.RUNNING]))
        return changed

    async def delete(self, team_id: TeamId, name: str) -> None:
        """Raises `NotFound`, and `Conflict` while sandboxes have rules for it."""
        secret = await self.get(team_id, name)
        if not await self._store.team(team_id).secrets.remove(secret):
            raise _not_found()


def _check_value(value: str) -> None:
    try:
        check_value(value)
    except InvalidSecret as error:
        raise InvalidRequest(f"value: {error}") from None


def _new_version() -> str:
    return new_random(_VERSION_BYTES).hex()


def _not_found() -> NotFound:
    return NotFound("There is no such secret")
