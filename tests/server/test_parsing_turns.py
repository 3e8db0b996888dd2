"""How much of the server's time one client address has for its large bodies."""

import asyncio
import time

from wrenn_sandbox.control.api.body import ParseTurns

_MIB = 1 << 20


async def parsed(turns: ParseTurns, address: str, log: list[str], size: int = _MIB) -> None:
    async with turns.turn(address, size):
        log.append(address)


async def test_a_large_body_waits_for_the_one_before_of_its_address() -> None:
    turns = ParseTurns()
    log: list[str] = []
    async with turns.turn("2001:db8::1", _MIB):
        others = asyncio.gather(
            *(parsed(turns, each, log) for each in ("2001:db8::2", "2001:db8:0:1::1", "192.0.2.1")),
            parsed(turns, "2001:db8::1", log, size=1000),
        )
        await asyncio.sleep(0.01)
        assert log == ["2001:db8:0:1::1", "192.0.2.1", "2001:db8::1"]
    await others
    assert log[3:] == ["2001:db8::2"]


async def test_as_much_time_is_left_to_others() -> None:
    turns = ParseTurns()
    begin = time.perf_counter()
    async with turns.turn("192.0.2.1", _MIB):
        time.sleep(0.05)  # noqa: ASYNC251 - as parsing does
    assert time.perf_counter() - begin >= 0.1


async def test_addresses_are_not_remembered() -> None:
    turns = ParseTurns()
    await parsed(turns, "192.0.2.1", [])
    assert not turns._turns
