"""One HTTP endpoint before several replicas: each request goes to one of them, and on to another if that one dies.

What is refused before a request is read is refused here, as by a single server. A response is begun for the client only
when there is something of its body: until then another replica can answer. It knows nothing of Ray.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Metric, generate_latest
from prometheus_client.samples import Sample

from acttail._version import __version__
from acttail.serve.errors import ApiError
from acttail.serve.guard import guard
from acttail.serve.limits import CLIENT, respond
from acttail.serve.metrics import path_label
from acttail.serve.replica import Message, Report, plain_scope
from acttail.serve.server import Options
from acttail.serve.sticky import conversation_of

_LOG = logging.getLogger("acttail.serve")
# Replicas that one request may lose: what has taken three down would take all.
_TRIES = 3
# A replica that has not told how it is by then counts as silent.
_REPORT_SECONDS = 5.0
# Beyond the waits that a replica keeps itself, for starting one and for the way there and back.
_SLACK_SECONDS = 60.0
# The end of a stream.
_DONE = b"data: [DONE]\n\n"
_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[Message]]
_Send = Callable[[Message], Awaitable[None]]


class ReplicaGoneError(Exception):
    """The replica that answered is no more, or cannot be reached."""


class NoRoomError(Exception):
    """All replicas are full, and so is the line before them."""


class Replicas(Protocol):
    """The replicas of one model."""

    def ask(
        self, scope: dict[str, Any], body: bytes, conversation: str | None
    ) -> AsyncIterator[Message]:
        """Answer a request by one replica: the ASGI messages of its response as they come.

        Raises:
            ReplicaGoneError: the replica died meanwhile.
            NoRoomError: no replica takes it.
        """
        ...

    async def reports(self, *, metrics: bool) -> list[Report]:
        """What each tells of itself; those that cannot are left out."""
        ...

    async def close(self, seconds: float) -> None:
        """Take no more requests; those that run end within so many seconds."""
        ...


class Endpoint:
    """What the routes share.

    Args:
        replicas: that answer.
        options: what is allowed.
    """

    def __init__(self, replicas: Replicas, options: Options) -> None:
        self.replicas, self.options = replicas, options
        self.metrics = EndpointMetrics()
        self.closing = False
        self._closer: asyncio.Task[None] | None = None

    def close(self, seconds: float) -> None:
        """Take no more requests; those that run end within so many seconds."""
        self.closing = True
        self._closer = asyncio.get_running_loop().create_task(self._close(seconds))

    async def _close(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.replicas.close(seconds), _REPORT_SECONDS)
        except Exception as error:
            _LOG.warning("a replica was not told that the server ends: %s", error)

    async def reports(self, *, metrics: bool = False) -> list[Report]:
        """What the replicas tell of themselves; none where they do not in time."""
        try:
            found = await asyncio.wait_for(self.replicas.reports(metrics=metrics), _REPORT_SECONDS)
        except Exception as error:
            _LOG.warning("the replicas do not tell how they are: %s", error)
            return []
        return sorted(found, key=lambda report: report.replica)


class EndpointMetrics:
    """Counters of the endpoint."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"acttail_endpoint_{name}", help_, labels, registry=self.registry)

        self.requests = counter("requests", "Requests answered at the endpoint.", "path", "status")
        self.retries = counter(
            "retries", "Requests that went on to another replica when theirs died."
        )
        self.broken = counter("broken_streams", "Streams that ended with their replica.")

    def response(self, path: str, status: int) -> None:
        """Count a response."""
        self.requests.labels(path_label(path), status).inc()

    def page(self, reports: Iterable[Report]) -> bytes:
        """Prometheus' text format: the endpoint's counters, and each replica's under its name."""
        return generate_latest(_Joined([*self.registry.collect(), *labelled(reports)]))


class _Joined(CollectorRegistry):
    """Families that were collected elsewhere."""

    def __init__(self, families: list[Metric]) -> None:
        super().__init__()
        self._found = families

    def collect(self) -> Iterable[Metric]:
        return self._found


def labelled(reports: Iterable[Report]) -> list[Metric]:
    """The families of all replicas, each once, every sample under its replica's name; and how many replicas there are."""
    families: dict[str, Metric] = {}
    count = Metric("acttail_replicas", "Replicas that answer.", "gauge")
    number = 0
    for report in reports:
        number += 1
        for found in report.metrics:
            family = families.setdefault(
                found.name, Metric(found.name, found.documentation, found.type)
            )
            family.samples += [
                Sample(s.name, {**s.labels, "replica": report.replica}, s.value)
                for s in found.samples
            ]
    count.add_sample("acttail_replicas", {}, number)
    return [count, *families.values()]


def create_endpoint(replicas: Replicas, options: Options | None = None) -> FastAPI:
    """Make the application of the endpoint.

    Args:
        replicas: that answer; their applications need no keys and no names of hosts.
        options: what is allowed; what concerns generations is the replicas' own.
    """
    options = options or Options()
    endpoint = Endpoint(replicas, options)
    app = FastAPI(
        title="acttail", version=__version__, docs_url=None, redoc_url=None, openapi_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    app.state.server = endpoint
    app.state.endpoint = endpoint

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        reports = await endpoint.reports()
        told = {
            "status": "ok" if reports else "no replica answers",
            "waiting": sum(r.waiting for r in reports), "running": sum(r.running for r in reports),
            "replicas": [{"replica": r.replica, "waiting": r.waiting, "running": r.running} for r in reports],
        }  # fmt: skip
        return JSONResponse(told, 200 if reports else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        page = endpoint.metrics.page(await endpoint.reports(metrics=True))
        return Response(page, media_type="text/plain; version=0.0.4")

    # Whatever else is asked for is asked of a replica.
    app.router.default = Forward(endpoint)
    guard(app, options, endpoint.metrics.response)
    return app


class Forward:
    """ASGI application that hands requests to replicas.

    Args:
        endpoint: whose replicas they are.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        options = endpoint.options
        self._seconds = options.wait_seconds + options.run_seconds + _SLACK_SECONDS

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Answer a request, for as long as its client listens."""
        if scope["type"] != "http":
            return
        body = (await receive()).get("body", b"")  # the gate hands it on in one piece
        answering = asyncio.create_task(self._answer(scope, body, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answering.done():
                answering.cancel()
        if not answering.cancelled():
            try:
                await answering
            except asyncio.CancelledError:
                if not leaving.done():
                    raise

    async def _answer(self, scope: _Scope, body: bytes, send: _Send) -> None:
        """Answer by one replica after the other, until one has begun."""
        plain = plain_scope(scope)
        conversation = conversation_of(scope[CLIENT], body)
        response = _Begun(send)
        try:
            await asyncio.wait_for(self._tried(plain, body, conversation, response), self._seconds)
        except ApiError as error:
            await self._fail(error, response)
        except asyncio.TimeoutError:
            late = _unavailable(f"no replica answered in {self._seconds:g} s; try again")
            await self._fail(late, response)

    async def _tried(
        self, scope: dict[str, Any], body: bytes, conversation: str | None, response: "_Begun"
    ) -> None:
        for _ in range(_TRIES):
            if self._endpoint.closing:
                raise _unavailable("the server is shutting down; try again", "shutting_down")
            try:
                answer: Any = self._endpoint.replicas.ask(scope, body, conversation)
                async with aclosing(answer):
                    async for message in answer:
                        await response.take(message)
            except NoRoomError:
                raise _unavailable("the queue is full; try again") from None
            except ReplicaGoneError as error:
                _LOG.warning("a replica was lost: %s", error)
                if response.said:  # all but that it was all
                    await response.send({"type": "http.response.body", "body": b""})
                    return
                if response.begun:
                    self._endpoint.metrics.broken.inc()
                    raise _unavailable("the replica that answered was lost; try again") from error
                self._endpoint.metrics.retries.inc()
            else:
                return
        raise _unavailable(f"{_TRIES} replicas were lost with this request", "replicas_lost")

    async def _fail(self, error: ApiError, response: "_Begun") -> None:
        """Tell of an error as far as that is still possible."""
        if not response.begun:
            await respond(response.send, error)
        elif response.streams:
            # As a single server does: the error is the last event, and [DONE] does not come.
            event = f"data: {json.dumps(error.body())}\n\n".encode()
            await response.send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            raise error


def _unavailable(message: str, code: str = "overloaded") -> ApiError:
    return ApiError(503, message, "server_error", code=code, retry_after=5)


async def _left(receive: _Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Begun:
    """A response on its way to the client, whose head waits for the first of its body.

    Args:
        send: of the client.
    """

    def __init__(self, send: _Send) -> None:
        self.send = send
        self.begun = self.streams = self.said = False
        self._head: Message | None = None

    async def take(self, message: Message) -> None:
        """Hand a message on, or keep it until there is a body."""
        if message["type"] == "http.response.start":
            self._head = message
            return
        if self._head is not None and not self.begun:
            self.begun = True
            headers = dict(self._head["headers"])
            self.streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            await self.send(self._head)
        await self.send(message)
        self.said = self.streams and message.get("body", b"").endswith(_DONE)
