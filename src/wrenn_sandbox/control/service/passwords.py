"""Argon2id hashing of passwords, in threads and few at a time."""

import asyncio

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError

from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.model.limits import PASSWORD_MAX, PASSWORD_MIN

_AT_ONCE = 2


def check_password(password: str) -> None:
    """Raise `InvalidRequest` for one that nobody may choose."""
    if not PASSWORD_MIN <= len(password) <= PASSWORD_MAX:
        raise InvalidRequest(
            f"password must have between {PASSWORD_MIN} and {PASSWORD_MAX} characters"
        )


class Passwords:
    """Hashes and checks passwords; one hash costs some 50 ms and 64 MiB by default."""

    def __init__(self, hasher: PasswordHasher | None = None) -> None:
        self._hasher = hasher or PasswordHasher()
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._nobody: str | None = None

    async def prepare(self) -> None:
        """Make the hash that stands in for the one of an unknown user."""
        self._nobody = await self.hash("the password of nobody")

    async def hash(self, password: str) -> str:
        async with self._turns:
            return await asyncio.to_thread(self._hasher.hash, password)

    async def verify(self, hashed: str | None, password: str) -> bool:
        """Whether `password` fits; takes as long without a hash to compare with."""
        if self._nobody is None:
            await self.prepare()
        async with self._turns:
            fits = await asyncio.to_thread(self._fits, hashed or self._nobody or "", password)
        return fits and hashed is not None

    def _fits(self, hashed: str, password: str) -> bool:
        try:
            return self._hasher.verify(hashed, password)
        except (VerifyMismatchError, InvalidHashError):
            return False
