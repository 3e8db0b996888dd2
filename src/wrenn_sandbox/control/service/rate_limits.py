"""How often one address, and one email, may try to sign up or log in."""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

from wrenn_sandbox.errors import RateLimited
from wrenn_sandbox.model.limits import Rate, parse_rate

MOST_REMEMBERED: Final = 65_536
"""Addresses, and emails, whose attempts are remembered; beyond those the oldest are forgotten."""


class AttemptLimits:
    """Limits such as `20/minute`.

    An address and an email are counted as they are given: one client, and one account, must always
    be written in one way. `now` gives seconds.
    """

    def __init__(
        self, *, per_email: str, per_address: str, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._emails = MovingWindow(parse_rate(per_email), now)
        self._addresses = MovingWindow(parse_rate(per_address), now)

    async def attempt(self, *, email: str, address: str) -> None:
        """Count one attempt; raises `RateLimited` when there were too many."""
        await self.attempt_from(address)
        _require(self._emails.hit(email), "email")

    async def attempt_from(self, address: str) -> None:
        """The same where no email is known yet."""
        _require(self._addresses.hit(address), "address")


class MovingWindow:
    """Counts what happened within the last so many seconds, for each of many.

    Kept are the times of what counted, and nothing of who has been quiet for a window.
    """

    def __init__(self, limit: Rate, now: Callable[[], float], most: int = MOST_REMEMBERED) -> None:
        self._amount, self._seconds = limit
        self._now = now
        self._most = most
        self._times: OrderedDict[str, deque[float]] = OrderedDict()
        """Who was counted last stands last."""

    def hit(self, who: str) -> float | None:
        """Count once more; else, where the limit is reached, give the seconds until it is not."""
        now = self._now()
        begin = now - self._seconds
        times = self._times.setdefault(who, deque())
        while times and times[0] <= begin:
            times.popleft()
        if len(times) >= self._amount:
            return times[0] - begin
        times.append(now)
        self._times.move_to_end(who)
        self._forget(begin)
        return None

    def _forget(self, begin: float) -> None:
        while True:
            who, times = next(iter(self._times.items()))
            if len(self._times) <= self._most and times and times[-1] > begin:
                return
            del self._times[who]


def _require(wait: float | None, kind: str) -> None:
    if wait is not None:
        raise RateLimited(
            f"Too many attempts from this {kind}; try again later", retry_after=max(1.0, wait)
        )
