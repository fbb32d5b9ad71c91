"""One request as a group of generations, and its events as an asynchronous stream."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from acttail.engine.generation import Piece
from acttail.errors import ActTailError
from acttail.serve.errors import ApiError
from acttail.serve.jobs import Job, Outcome
from acttail.serve.metrics import Metrics
from acttail.serve.scheduler import Scheduler

_LOG = logging.getLogger("acttail.serve")
# Which of a request's generations, and what: nothing if the client has gone.
_Event = tuple[int, Piece | Outcome | None]


def _closing() -> ApiError:
    return ApiError(
        503, "the server is shutting down; try again", "server_error", code="shutting_down", retry_after=5
    )  # fmt: skip


class Mailbox:
    """Hands events from the scheduler's thread to an event loop, all that there are at a wake-up.

    A loop that was woken by each would take the interpreter from the thread that is still making the others of a turn.

    Args:
        loop: that takes them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[tuple[asyncio.Queue[_Event], _Event]] = deque()
        self._waking = False

    def put(self, queue: "asyncio.Queue[_Event]", event: _Event) -> None:
        """Put an event into a queue of the loop, from any thread; it is there after the next :meth:`wake`."""
        self._events.append((queue, event))

    def wake(self) -> None:
        """Have the loop deliver what was put, from any thread."""
        if self._events and not self._waking:
            self._waking = True
            with suppress(RuntimeError):  # the loop has ended: nobody listens any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Before anything is taken: whoever puts something later wakes the loop again.
        self._waking = False
        while self._events:
            queue, event = self._events.popleft()
            queue.put_nowait(event)


class Call:
    """Generations that answer one request.

    Args:
        scheduler: that runs them.
        mailbox: of the event loop.
        metrics: that note how they went.
        receive: of ASGI, after the body: what it gives next says that the client has disconnected.
    """

    def __init__(
        self, scheduler: Scheduler, mailbox: Mailbox, metrics: Metrics, receive: Callable[[], Awaitable[Any]]
    ) -> None:  # fmt: skip
        self._scheduler, self._mailbox = scheduler, mailbox
        self._metrics, self._receive = metrics, receive
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._left = 0
        self.jobs: list[Job] = []

    def add(self, **fields: Any) -> None:
        """Add a generation; fields as of :class:`Job`."""
        index = len(self.jobs)

        self.jobs.append(
            Job(emit=lambda event: self._mailbox.put(self._events, (index, event)), **fields)
        )

    def submit(self) -> None:
        """Queue the generations.

        Raises:
            ApiError: 429, the client has too many; 503, the queue is full.
        """
        limit, client = self._scheduler.per_client, self.jobs[0].client
        if self._scheduler.held(client) + len(self.jobs) > limit:
            raise ApiError(
                429, f"this client has {limit} requests waiting or running; wait for one to end",
                "rate_limit_error", code="rate_limit_exceeded", retry_after=1,
            )  # fmt: skip
        if self._scheduler.closing:
            raise _closing()
        if not self._scheduler.submit(self.jobs):
            raise ApiError(
                503, "the queue is full; try again", "server_error", code="overloaded", retry_after=5
            )  # fmt: skip

    async def events(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """(index, piece), and (index, None) as each generation ends.

        Raises:
            ApiError: a generation failed or waited too long.
        """
        self._left = len(self.jobs)
        # A task beside, for a deadline of each event would cost more than the event.
        watching = asyncio.create_task(self._watch())
        try:
            while self._left:
                index, event = await self._events.get()
                if event is None:
                    return
                if isinstance(event, Piece):
                    yield index, event
                    continue
                self._finish(self.jobs[index], event)
                self._left -= 1
                yield index, None
        finally:
            watching.cancel()
            self.cancel()

    @property
    def waits(self) -> bool:
        """Whether the next of :meth:`events` is yet to come: neither is one there, nor is this the end."""
        return self._left > 0 and self._events.empty()

    async def _watch(self) -> None:
        """Tell the events' reader when the client has gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait((-1, None))

    def _finish(self, job: Job, outcome: Outcome) -> None:
        if outcome == "expired":
            raise ApiError(
                503, f"no slot became free in {self._scheduler.wait_seconds:g} s; try again", "server_error",
                code="overloaded", retry_after=5,
            )  # fmt: skip
        if outcome == "closed":
            raise _closing()
        if outcome == "failed":
            if isinstance(job.error, ActTailError):
                raise ApiError(400, str(job.error))
            _LOG.error("a generation failed", exc_info=job.error)
            raise ApiError(500, "the generation failed; see the server's log", "server_error")
        self._metrics.ended(job)

    def cancel(self) -> None:
        """Stop what still runs; harmless at the end."""
        for job in self.jobs:
            job.cancel()
