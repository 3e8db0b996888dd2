"""How many connections there may be."""

from collections import Counter
from contextlib import ExitStack

from wrenn_sandbox.control.api.forwarded import TrustedProxies, group_of
from wrenn_sandbox.errors import NoCapacity, RateLimited


class Connections:
    """Gives out places: `total` of them, and to one address no more than `per_address`.

    Trusted proxies stand for many clients and are counted in the total only.
    """

    def __init__(
        self, *, total: int, per_address: int, trusted: TrustedProxies | None = None
    ) -> None:
        self._total = total
        self._per_address = per_address
        self._trusted = trusted or TrustedProxies()
        self._taken: Counter[str] = Counter()
        self.count = 0
        """Places that are taken."""

    def admit(self, address: str) -> ExitStack:
        """A place, given back when it is closed, which may happen more than once.

        Raises `NoCapacity` when all are taken, `RateLimited` when this address has its share.
        """
        if self.count >= self._total:
            raise NoCapacity("The server has too many connections; try again later", retry_after=5)
        group = "" if address in self._trusted else group_of(address)
        if group and self._taken[group] >= self._per_address:
            raise RateLimited("Too many connections from this address", retry_after=5)
        self.count += 1
        self._taken[group] += 1
        place = ExitStack()
        place.callback(self._give_back, group)
        return place

    def _give_back(self, group: str) -> None:
        self.count -= 1
        self._taken[group] -= 1
        if not self._taken[group]:
            del self._taken[group]
