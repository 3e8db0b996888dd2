"""How long the event loop was held up."""

import asyncio
import time


class Lag:
    """The most processor time that the event loop's thread took between two looks at it.

    Not the time on the clock: the machine has other work.
    """

    def __init__(self) -> None:
        self.worst = 0.0
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.001)
            self.worst = max(self.worst, time.thread_time() - before)

    async def end(self) -> float:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        return self.worst
