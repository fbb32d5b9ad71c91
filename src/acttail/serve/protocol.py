"""HTTP/1.1 on a connection, as uvicorn and h11 do it, with deadlines and a limit of connections."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from acttail.serve.errors import ApiError


@dataclass(frozen=True)
class Deadlines:
    """What a connection may take its time for, in seconds.

    Attributes:
        header: from the connection, or the first byte of a further request, to the end of its header.
        idle: between two requests.
        write: while the client reads nothing of what is written for it.
    """

    header: float = 10.0
    idle: float = 30.0
    write: float = 60.0


class Protocol(H11Protocol):
    """One connection.

    Args:
        deadlines: of it.
        connections: that are served at once; a further one is answered 503.
        hard: connections from which on one is closed without a word, so that files remain for the rest.
        count: called with (path, status) for answers that no application gives.
        arguments: of uvicorn.
    """

    def __init__(
        self, *, deadlines: Deadlines, connections: int, hard: int, count: Callable[[str, int], None],
        **arguments: Any,
    ) -> None:  # fmt: skip
        super().__init__(**arguments)
        self._deadlines, self._most, self._hard, self._count = deadlines, connections, hard, count
        self._header: asyncio.TimerHandle | None = None
        self._write: asyncio.TimerHandle | None = None
        self._over = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first header."""
        super().connection_made(transport)
        if len(self.connections) > self._hard:
            transport.abort()
            return
        self._over = len(self.connections) > self._most
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks."""
        self._stop_header()
        self.resume_writing()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Go on reading; a header that begins has its deadline."""
        if self._over:
            full = "the server has too many connections; try again"
            self._refuse(ApiError(503, full, "server_error", code="overloaded", retry_after=5))
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._header is None:
            self._await_header()
        super().data_received(data)

    def handle_events(self) -> None:
        """Read what has come; the clock of a header stops with its end."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before or self.transport.is_closing():
            self._stop_header()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as everything else is answered."""
        self._refuse(ApiError(400, "this is no valid HTTP/1.1 request"))

    def pause_writing(self) -> None:
        """Give the client so long to read something."""
        super().pause_writing()
        self._write = self.loop.call_later(self._deadlines.write, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: it has read."""
        if self._write is not None:
            self._write.cancel()
            self._write = None
        super().resume_writing()

    def _await_header(self) -> None:
        self._header = self.loop.call_later(self._deadlines.header, self._late)

    def _stop_header(self) -> None:
        if self._header is not None:
            self._header.cancel()
            self._header = None

    def _late(self) -> None:
        self._header = None
        self._refuse(
            ApiError(408, f"the request's header did not arrive in {self._deadlines.header:g} s")
        )

    def _refuse(self, error: ApiError) -> None:
        """Answer without an application, and close."""
        self._stop_header()
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body, headers = error.whole(closes=True)
            self._count("", error.status)
            for event in (
                h11.Response(status_code=error.status, headers=list(headers.items())),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
