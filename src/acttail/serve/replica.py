"""One replica of a served model: the whole application in a process of its own, asked by messages instead of a socket.

It knows nothing of Ray, which makes it an actor, nor of how its engine is opened.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from prometheus_client import Metric

from acttail.errors import ActTailError
from acttail.serve.limits import CLIENT

Message = MutableMapping[str, Any]


@dataclass(frozen=True)
class Report:
    """What a replica tells of itself.

    Attributes:
        replica: its name.
        waiting: requests without a slot.
        running: requests with one.
        metrics: its counters.
    """

    replica: str
    waiting: int
    running: int
    metrics: tuple[Metric, ...] = ()


def plain_scope(scope: MutableMapping[str, Any]) -> dict[str, Any]:
    """What of an ASGI request can travel: its line, its headers and whom it is counted for.

    The gate of the endpoint has let it in, and says who the client is: a replica needs no keys for it.
    """
    kept = ("type", "asgi", "http_version", "method", "scheme", "path", "query_string", "headers")
    found = {name: scope[name] for name in kept if name in scope}
    return {**found, "root_path": "", "client": (scope[CLIENT], 0), "server": None}


class Replica:
    """The application of one replica.

    Args:
        make: makes it; of :func:`acttail.serve.create_app`.
        name: tells its name, where it runs.
    """

    def __init__(self, make: Callable[[], FastAPI], name: Callable[[], str]) -> None:
        self._app = make()
        self._server = self._app.state.server
        self._name = name()
        self._life: asyncio.Task[None] | None = None

    async def ask(
        self, scope: dict[str, Any], body: bytes, conversation: str | None = None
    ) -> AsyncIterator[Message]:
        """Answer a request: the ASGI messages of its response as they come.

        Whoever stops listening cancels it.

        Args:
            scope: of :func:`plain_scope`.
            body: of the request.
            conversation: that the request was sent here for.
        """
        if self._life is None:
            self._life = asyncio.create_task(self._live())
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        left = asyncio.Event()
        given = False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def answer() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(answer())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            left.set()
            task.cancel()

    async def _live(self) -> None:
        """What the application does besides answering."""
        async with self._app.router.lifespan_context(self._app):
            await asyncio.Event().wait()

    def report(self, *, metrics: bool = False) -> Report:
        """How much there is to do.

        Args:
            metrics: with the counters.
        """
        scheduler = self._server.scheduler
        counted = tuple(self._server.metrics.registry.collect()) if metrics else ()
        return Report(self._name, scheduler.waiting, scheduler.running, counted)

    def close(self, seconds: float) -> None:
        """Take no more requests; those that run end within so many seconds."""
        self._server.close(seconds)

    def check_health(self) -> None:
        """Fail where no token will ever come again.

        Raises:
            ActTailError: the scheduler's thread has ended.
        """
        if not self._server.scheduler.alive:
            raise ActTailError("the scheduler's thread has ended")
