"""How often one address, and one email, may try to sign up or log in."""

import time

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter

from wrenn_sandbox.errors import RateLimited


class AttemptLimits:
    """Limits in the notation of the `limits` package, such as `20/minute`."""

    def __init__(self, *, per_email: str, per_address: str) -> None:
        self._per_email = parse(per_email)
        self._per_address = parse(per_address)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    async def attempt(self, *, email: str, address: str) -> None:
        """Count one attempt; raises `RateLimited` when there were too many."""
        await self.attempt_from(address)
        await self._count(self._per_email, "email", email)

    async def attempt_from(self, address: str) -> None:
        """The same where no email is known yet."""
        await self._count(self._per_address, "address", address)

    async def _count(self, limit: RateLimitItem, kind: str, who: str) -> None:
        if await self._limiter.hit(limit, kind, who):
            return
        window = await self._limiter.get_window_stats(limit, kind, who)
        raise RateLimited(
            f"Too many attempts from this {kind}; try again later",
            retry_after=max(1.0, window.reset_time - time.time()),
        )
