"""The plain routes: /health, /metrics, /envs, and /init, which starts a life of the sandbox."""

from __future__ import annotations

from . import fields
from .auth import Auth
from .connect import UNARY_LIMIT, dump
from .environment import Environment
from .errors import InvalidArgument, from_os_error
from .exchange import Exchange
from .fields import Message
from .metrics import Metrics
from .server import Server
from .timestamps import parse_time
from .tunnel import Tunnels

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .machine import Machine

_MIN_ENTROPY, _MAX_ENTROPY = 32, 4096
_FEWEST_PROCESSES, _LEAST_RESERVED = 16, 8 << 20
_MAX_AUTHORITY = 16 * 1024
_PEM = "-----BEGIN CERTIFICATE-----\n"
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.")


class Identity:
    """The checked body of /init; None means "leave as it is"."""

    def __init__(self, message: Message) -> None:
        stamp = message.get("timestamp")
        given = message.get("envVars")
        self.envs = None if given is None else fields.text_map(message, "envVars")
        self.token = fields.text(message, "accessToken") or None
        self.now = None if stamp is None or stamp == "" else parse_time(stamp)
        self.user = fields.text(message, "defaultUser") or None
        self.workdir = fields.text(message, "defaultWorkdir") or None
        self.entropy = fields.data(message, "entropy")
        self.hostname = _name(message, "hostname", 64)
        self.machine_id = _name(message, "machineId", 64)
        self.generation = fields.text(message, "generation") or None
        self.limits = _limits(message)
        self.trusted_ca = _authority(message)
        if self.entropy is not None and not _MIN_ENTROPY <= len(self.entropy) <= _MAX_ENTROPY:
            raise InvalidArgument(f"entropy must have {_MIN_ENTROPY} to {_MAX_ENTROPY} bytes")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise InvalidArgument("accessToken must be printable ASCII")


class Life:
    """The present life of the sandbox; a machine is given only inside a VM."""

    def __init__(
        self,
        auth: Auth,
        environment: Environment,
        metrics: Metrics,
        machine: Machine | None,
        tunnels: Tunnels,
    ) -> None:
        self._auth = auth
        self._environment = environment
        self._metrics = metrics
        self._machine = machine
        self._tunnels = tunnels
        self._generation: str | None = None
        self.server: Server

    async def health(self, exchange: Exchange) -> None:
        """`GET /health`."""
        await exchange.reply(204)

    async def metrics(self, exchange: Exchange) -> None:
        """`GET /metrics`."""
        await exchange.reply(200, dump(self._metrics.read()))

    async def envs(self, exchange: Exchange) -> None:
        """`GET /envs`."""
        variables: Message = dict(self._environment.variables)
        await exchange.reply(200, dump(variables))

    async def init(self, exchange: Exchange) -> None:
        """`POST /init`: everything is checked before anything is changed."""
        identity = Identity(fields.parse(await exchange.body.whole(UNARY_LIMIT)))
        if identity.user is not None:
            self._auth.user(identity.user)
        if self._machine is not None:
            _take_over(self._machine, identity)
        if identity.token is not None:
            self._auth.token = identity.token
        if identity.envs is not None:
            self._environment.variables = identity.envs
        if identity.user is not None:
            self._auth.default_user = identity.user
        if identity.workdir is not None:
            self._environment.workdir = identity.workdir
        if self._machine is not None and identity.trusted_ca is not None:
            self._environment.trust = await self._machine.trust.set(identity.trusted_ca)
        try:
            await exchange.reply(204)
        finally:  # also when nobody waits for the answer; nothing else has its turn before
            if identity.generation is not None and identity.generation != self._generation:
                self._generation = identity.generation
                self.server.drop_others(exchange.connection)
                self._tunnels.end_direct()
            self._environment.read_locale()
            if self._machine is not None:
                await self._machine.write_names(identity.hostname, identity.machine_id)


def _take_over(machine: Machine, identity: Identity) -> None:
    try:
        if identity.now is not None:
            machine.set_clock(identity.now)
        if identity.entropy is not None:
            machine.add_entropy(identity.entropy)
        if identity.hostname is not None:
            machine.set_hostname(identity.hostname)
        if identity.limits is not None:
            machine.limit_commands(*identity.limits)
    except OSError as error:
        raise from_os_error(error, "init failed") from error


def _limits(message: Message) -> tuple[int, int] | None:
    """Most processes of all commands, and bytes of memory that these leave free."""
    given = fields.nested(message, "limits")
    if given is None:
        return None
    processes, reserved = fields.number(given, "processes"), fields.number(given, "reservedMemory")
    if processes < _FEWEST_PROCESSES or reserved < _LEAST_RESERVED:
        raise InvalidArgument(
            f"limits must have at least {_FEWEST_PROCESSES} processes"
            f" and {_LEAST_RESERVED} bytes of reservedMemory"
        )
    return processes, reserved


def _authority(message: Message) -> str | None:
    """PEM of a certificate, or an empty text."""
    if message.get("trustedCa") is None:
        return None
    value = fields.text(message, "trustedCa")
    if value and (len(value) > _MAX_AUTHORITY or not value.startswith(_PEM)):
        raise InvalidArgument("trustedCa must be a certificate as PEM")
    return value


def _name(message: Message, field: str, limit: int) -> str | None:
    value = fields.text(message, field)
    if not value:
        return None
    if len(value) > limit or not _ID_CHARACTERS.issuperset(value):
        raise InvalidArgument(f"{field} must be at most {limit} letters, digits, `-` or `.`")
    return value
