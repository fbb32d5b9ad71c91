"""One request as a group of generations, and its events as an asynchronous stream."""

import asyncio
import logging
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
# How often a request that waits looks whether its client is still there.
_LOOK_SECONDS = 0.5


def _closing() -> ApiError:
    return ApiError(
        503, "the server is shutting down; try again", "server_error", code="shutting_down", retry_after=5
    )  # fmt: skip


class Call:
    """Generations that answer one request.

    Args:
        scheduler: that runs them.
        metrics: that note how they went.
        gone: tells whether the client has disconnected.
    """

    def __init__(
        self, scheduler: Scheduler, metrics: Metrics, gone: Callable[[], Awaitable[bool]]
    ) -> None:
        self._scheduler, self._metrics, self._gone = scheduler, metrics, gone
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Piece | Outcome]] = asyncio.Queue()
        self.jobs: list[Job] = []

    def add(self, **fields: Any) -> None:
        """Add a generation; fields as of :class:`Job`."""
        index = len(self.jobs)

        def emit(event: Piece | Outcome) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody listens any more
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self.jobs.append(Job(emit=emit, **fields))

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
        left = len(self.jobs)
        looked = self._loop.time()
        try:
            while left:
                if self._loop.time() - looked >= _LOOK_SECONDS:
                    if await self._gone():
                        return
                    looked = self._loop.time()
                try:
                    index, event = await asyncio.wait_for(self._events.get(), _LOOK_SECONDS)
                except asyncio.TimeoutError:
                    continue
                if isinstance(event, Piece):
                    yield index, event
                    continue
                self._finish(self.jobs[index], event)
                left -= 1
                yield index, None
        finally:
            self.cancel()

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
