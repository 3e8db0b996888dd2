"""What hosts are given to follow the rules for secrets of sandboxes.

Hosts keep it in memory alone. Its version says whether what a host has is what it should have.
"""

import hashlib
from collections.abc import Iterable, Mapping

import msgspec

from wrenn_sandbox.control.store.records import Sandbox, Secret
from wrenn_sandbox.errors import InvalidRequest, InvalidState
from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.model.secrets import Injection
from wrenn_sandbox.wire.messages import Egress

from .context import ControlContext
from .vault import Unsealable, Vault


class Injections:
    """`use` a vault first."""

    def __init__(self, context: ControlContext) -> None:
        self._store = context.store
        self._vault: Vault | None = None

    def use(self, vault: Vault) -> None:
        self._vault = vault

    @property
    def vault(self) -> Vault:
        assert self._vault is not None
        return self._vault

    async def require(self, team_id: TeamId, network: Egress, prefix: str) -> None:
        """Raise `InvalidRequest` where a policy refers to a secret that the team does not have."""
        if not network.secrets:
            return
        known = await self._store.team(team_id).secrets.versions()
        for number, rule in enumerate(network.secrets):
            if rule.secret not in known:
                raise InvalidRequest(
                    f"{prefix}secrets.{number}.value: there is no secret {rule.secret}"
                )

    async def of(self, team_id: TeamId, sandbox_id: SandboxId, network: Egress) -> Injection | None:
        """What it takes to follow the rules of a policy, None without rules.

        Raises `InvalidState` where a secret is gone or cannot be unsealed.
        """
        if not network.secrets:
            return None
        wanted = {rule.secret for rule in network.secrets}
        found = await self._store.team(team_id).secrets.named(wanted)
        secrets = {each.name: each for each in found}
        values = {name: self._value(name, secrets.get(name)) for name in wanted}
        authority = self.vault.authority(sandbox_id)
        names = tuple(dict.fromkeys(rule.name for rule in network.secrets))
        certificate, key = authority.certify(names)
        return Injection(
            version=_version(network, {each.name: each.version for each in found}),
            ca=authority.certificate(),
            certificate=certificate,
            key=key,
            headers=tuple(
                (rule.name, rule.header, rule.filled(values[rule.secret]))
                for rule in network.secrets
            ),
        )

    async def versions(self, sandboxes: Iterable[Sandbox]) -> dict[SandboxId, str]:
        """Which versions hosts should have, of those sandboxes that have rules."""
        ruled = [each for each in sandboxes if each.network.secrets]
        if not ruled:
            return {}
        known = await self._store.secrets.versions({each.team_id for each in ruled})
        return {each.id: _version(each.network, known.get(each.team_id, {})) for each in ruled}

    def _value(self, name: str, secret: Secret | None) -> str:
        if secret is None:
            raise InvalidState(
                f"The secret {name}, which the network policy of the sandbox refers to, is gone"
            )
        try:
            return self.vault.unseal(secret.sealed, secret.purpose)
        except Unsealable as error:
            raise InvalidState(
                f"The secret {name} was stored with a key that this server does not have; set its"
                " value again"
            ) from error


def _version(network: Egress, versions: Mapping[str, str]) -> str:
    rules = [
        (rule.name, rule.header, rule.value, versions.get(rule.secret, ""))
        for rule in network.secrets
    ]
    return hashlib.sha256(msgspec.json.encode(rules)).hexdigest()[:32]
