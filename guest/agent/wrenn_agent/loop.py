"""A single-threaded event loop over epoll: file descriptors, timers and coroutines, nothing more.

asyncio would do the same for more: on an emulated CPU, a minimal agent on it took 29 % more CPU for
a command, held twice the memory and wrote to three times as many pages.

A coroutine is driven by a `Task`. It sleeps in `suspend()`; whoever knows the task calls `wake()`
(or `interrupt(error)` to raise inside of it). A wake-up is a hint: waiting code re-checks its
condition in a loop.
"""

from __future__ import annotations

import heapq
import io
import select
import sys
import time
import types
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    from .errors import AgentError, Disconnected

_MAX_EVENTS = 128
_CANCELLED_BEFORE_SWEEP = 256


@types.coroutine
def suspend() -> Generator[None, None, None]:
    """Sleep until the running task is woken."""
    yield


def report(error: BaseException) -> None:
    """Write an unexpected error to the console, as the agent's lines; the agent goes on."""
    console, said = sys.stderr, io.StringIO()
    try:
        sys.stderr = said
        try:
            sys.__excepthook__(type(error), error, error.__traceback__)
        finally:
            sys.stderr = console
        for line in said.getvalue().splitlines():
            console.write(f"wrenn-agent: {line}\n")
        console.flush()
    except (OSError, ValueError, MemoryError):
        return  # a console that cannot be written to is no reason to stop


class Task:
    """One coroutine on its way through the loop."""

    __slots__ = ("_coroutine", "_error", "_loop", "_queued", "_started", "done")

    def __init__(self, loop: Loop, coroutine: Coroutine[None, None, None]) -> None:
        self._loop = loop
        self._coroutine = coroutine
        self._error: BaseException | None = None
        self._queued = False
        self._started = False
        self.done = False

    def wake(self) -> None:
        """Let the coroutine go on in this round of the loop."""
        if not self._queued and not self.done:
            self._queued = True
            self._loop.ready.append(self)

    def interrupt(self, error: AgentError | Disconnected) -> None:
        """Raise `error` where the coroutine is waiting."""
        self._error = error
        self.wake()

    def run(self) -> None:
        """Advance the coroutine to its next wait; called by the loop."""
        self._queued = False
        error = None
        if self._started:
            error, self._error = self._error, None
        elif self._error is not None:
            self.wake()  # a coroutine has to be inside of its `try` before it can be interrupted
        self._started = True
        self._loop.current = self
        try:
            if error is None:
                self._coroutine.send(None)
            else:
                self._coroutine.throw(error)
        except StopIteration:
            self.done = True
        except Exception as unexpected:
            self.done = True
            report(unexpected)


class Timer:
    """A call in the future; `cancel()` takes it back."""

    __slots__ = ("_loop", "action", "when")

    def __init__(self, loop: Loop, when: float, action: Callable[[], None]) -> None:
        self._loop = loop
        self.when = when
        self.action: Callable[[], None] | None = action

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when

    def cancel(self) -> None:
        """Do nothing when the time comes."""
        if self.action is not None:
            self.action = None
            self._loop.count_cancelled()


class Notice:
    """Something that tasks wait for again and again, like "there is more output"."""

    __slots__ = ("_loop", "_waiting")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: list[Task] = []

    async def wait(self) -> None:
        """Sleep until the next `notify()` (or a spurious wake-up)."""
        task = self._loop.current
        self._waiting.append(task)
        try:
            await suspend()
        finally:
            if task in self._waiting:
                self._waiting.remove(task)

    def notify(self) -> None:
        """Wake everyone who waits now."""
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            task.wake()


class Loop:
    """The event loop; `current` is the task that runs right now."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._dropped: set[int] = set()
        self._timers: list[Timer] = []
        self._cancelled = 0
        self._running = False
        self.ready: deque[Task] = deque()
        self.current: Task

    def spawn(self, coroutine: Coroutine[None, None, None]) -> Task:
        """Start a coroutine in the next round of the loop."""
        task = Task(self, coroutine)
        task.wake()
        return task

    def register(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler(events)` whenever one of `events` (level-triggered) is true for `fd`."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def modify(self, fd: int, events: int) -> None:
        """Change the events that a registered `fd` is watched for."""
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Forget `fd`; nothing happens when it is not registered."""
        if self._handlers.pop(fd, None) is not None:
            self._dropped.add(fd)
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Call `action` once, after `seconds`."""
        timer = Timer(self, time.monotonic() + seconds, action)
        heapq.heappush(self._timers, timer)
        return timer

    def count_cancelled(self) -> None:
        """Sweep cancelled timers out once they are many."""
        self._cancelled += 1
        if self._cancelled > _CANCELLED_BEFORE_SWEEP:
            self._cancelled = 0
            self._timers = [timer for timer in self._timers if timer.action is not None]
            heapq.heapify(self._timers)

    async def breathe(self) -> None:
        """Let everything else have its turn; for long work that cannot wait for an event."""
        self.current.wake()
        await suspend()

    def run(self) -> None:
        """Serve until `stop()`; no error ends it, not even a lack of memory."""
        self._running = True
        while self._running:
            _guarded(self._run_once)

    def stop(self) -> None:
        """Leave `run()` after this round."""
        self._running = False

    def _run_once(self) -> None:
        self._dispatch(self._epoll.poll(self._patience(), _MAX_EVENTS))
        self._run_timers()
        for _ in range(len(self.ready)):
            self.ready.popleft().run()

    def _patience(self) -> float | None:
        if self.ready:
            return 0
        if not self._timers:
            return None
        return max(0.0, self._timers[0].when - time.monotonic())

    def _dispatch(self, events: list[tuple[int, int]]) -> None:
        self._dropped.clear()
        for fd, mask in events:
            if fd in self._dropped:
                continue  # closed by an earlier handler of this round, the number may be reused
            handler = self._handlers.get(fd)
            if handler is not None:
                _guarded(handler, mask)

    def _run_timers(self) -> None:
        if not self._timers:
            return
        now = time.monotonic()
        while self._timers and self._timers[0].when <= now:
            action = heapq.heappop(self._timers).action
            if action is not None:
                _guarded(action)


def _guarded(action: Callable[..., None], *arguments: int) -> None:
    try:
        action(*arguments)
    except Exception as error:
        report(error)
