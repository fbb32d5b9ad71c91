"""Listening: a socket, enough files, a graceful end."""

import asyncio
import functools
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from acttail.errors import ActTailError
from acttail.serve.protocol import Deadlines, Protocol

_LOG = logging.getLogger("acttail.serve")
# After the signal, running requests have so long to end; then they end with an error.
GRACE_SECONDS = 10.0
# Files kept free beside connections: the model's, logs, a page of metrics.
_SPARE_FILES = 64
# Connections the kernel may hold that are not accepted yet.
_BACKLOG = 256
# One line a minute about a kind of trouble that repeats with every connection.
_QUIET_SECONDS = 60.0


class _Server(uvicorn.Server):
    """uvicorn's server, telling when it listens and when it ends.

    Args:
        config: of uvicorn.
        ready: called once requests are taken.
        closing: called as soon as the server is to end, with the seconds that running requests have.
    """

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None] | None,
        closing: Callable[[float], None], grace: float,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._ready, self._closing, self._grace = ready, closing, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_Quiet())
        await super().startup(sockets)
        if self.started and self._ready is not None:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._closing(self._grace)
        await super().shutdown(sockets)


class _Quiet:
    """Handler of an event loop's errors that says of a lack of files what to do, and not with every try."""

    def __init__(self) -> None:
        self._said = float("-inf")

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error."""
        if "socket.accept() out of system resource" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._said > _QUIET_SECONDS:
            self._said = time.monotonic()
            _LOG.warning(
                "no files left for connections (%s); raise the limit (ulimit -n) or lower --connections",
                context.get("exception"),
            )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Args:
        host: name or address of an interface.
        port: 0 for any free one.

    Raises:
        ActTailError: the address cannot be bound; says why.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ActTailError(f"cannot listen on {host}: {error.strerror}") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        raise ActTailError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return found


def raise_file_limit() -> int | None:
    """Raise the limit of open files as far as this process may; files still free, None if unlimited."""
    try:
        import resource
    except ImportError:  # Windows counts no files
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError):  # macOS promises more than it gives
            pass
    if soft == resource.RLIM_INFINITY:
        return None
    opened = Path("/dev/fd")
    return max(2, soft - (len(list(opened.iterdir())) if opened.is_dir() else 0))


def config_of(
    app: Any, *, connections: int = 1024, deadlines: Deadlines | None = None
) -> uvicorn.Config:
    """How uvicorn is to serve an application.

    Args:
        app: of :func:`acttail.serve.create_app`.
        connections: served at once, fewer where the limit of open files is lower.
        deadlines: of a connection.
    """
    free = raise_file_limit()
    hard = connections * 2
    if free is not None:
        hard = max(1, min(hard, free - _SPARE_FILES if free > 2 * _SPARE_FILES else free // 2))
    deadlines = deadlines or Deadlines()
    protocol: Any = functools.partial(
        Protocol, deadlines=deadlines, connections=min(connections, max(1, hard * 3 // 4)), hard=hard,
        count=app.state.server.metrics.response,
    )  # fmt: skip
    # uvicorn would believe X-Forwarded-For of any client on this machine.
    return uvicorn.Config(
        app, log_level="error", access_log=False, timeout_graceful_shutdown=int(GRACE_SECONDS) + 10,
        timeout_keep_alive=int(deadlines.idle), server_header=False, proxy_headers=False, ws="none",
        http=protocol, backlog=_BACKLOG,
    )  # fmt: skip


def run(
    app: Any, bound: socket.socket, *, ready: Callable[[], None] | None = None, connections: int = 1024,
    grace: float = GRACE_SECONDS,
) -> None:  # fmt: skip
    """Serve until interrupted or terminated, then let running requests end.

    Requests that wait are answered 503 at once; those that run after the grace end with an error, a
    stream by an event that says so.

    Args:
        app: of :func:`acttail.serve.create_app`.
        bound: of :func:`listen`.
        ready: called once requests are taken.
        connections: served at once.
        grace: seconds that running requests have after the signal.
    """
    config = config_of(app, connections=connections)
    try:
        _Server(config, ready, app.state.server.close, grace).run(sockets=[bound])
    except (KeyboardInterrupt, SystemExit):  # uvicorn hands the signal on after a clean end
        return
    finally:
        bound.close()
