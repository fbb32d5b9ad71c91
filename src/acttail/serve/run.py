"""Listening: a socket, a graceful end."""

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from acttail.errors import ActTailError

# After the signal, running requests have so long to end.
_GRACE_SECONDS = 10


class _Server(uvicorn.Server):
    """uvicorn's server, telling when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._ready is not None:
            self._ready()


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
        found.listen(256)
    except OSError as error:
        found.close()
        raise ActTailError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return found


def run(app: Any, bound: socket.socket, *, ready: Callable[[], None] | None = None) -> None:
    """Serve until interrupted or terminated, then let running requests end.

    Args:
        app: of :func:`acttail.serve.create_app`.
        bound: of :func:`listen`.
        ready: called once requests are taken.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_SECONDS,
        timeout_keep_alive=30, server_header=False,
    )  # fmt: skip
    try:
        _Server(config, ready).run(sockets=[bound])
    except (KeyboardInterrupt, SystemExit):  # uvicorn hands the signal on after a clean end
        return
    finally:
        bound.close()
