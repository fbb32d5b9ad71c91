"""What a request must pass before it is read: its host, its key, its kind, its size."""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from acttail.serve.errors import ApiError

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Gate:
    """ASGI middleware that refuses before anything is parsed.

    Args:
        app: what comes after.
        max_body: bytes.
        api_keys: one of them must come as a bearer token under /v1; none for an open server.
        hosts: names the Host header may have; None for any. On loopback it keeps out pages of other
            sites that point their name at this machine (DNS rebinding).
    """

    def __init__(
        self, app: Any, *, max_body: int, api_keys: tuple[str, ...], hosts: tuple[str, ...] | None
    ) -> None:
        self.app, self.max_body = app, max_body
        self.api_keys = [k.encode() for k in api_keys]
        self.hosts = hosts

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Refuse the request or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v for k, v in scope["headers"]}
        try:
            self._check(scope, headers)
        except ApiError as error:
            await respond(send, error)
            return
        seen = 0
        too_long = False

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen, too_long
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body:
                # A chunked body has no length to refuse it by: cut it off and answer below.
                too_long = True
                return {"type": "http.disconnect"}
            return message

        started = False

        async def guarded(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if too_long and not started:
                return
            started = True
            await send(message)

        try:
            await self.app(scope, counted, guarded)
        except Exception:
            if not too_long:
                raise
        if too_long and not started:
            await respond(send, self._too_large())

    def _check(self, scope: _Scope, headers: dict[str, bytes]) -> None:
        host = headers.get("host", b"").decode("latin-1")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise ApiError(421, f"this server does not answer to the host name {host!r}")
        path = scope["path"]
        if self.api_keys and path.startswith("/v1"):
            scheme, _, key = headers.get("authorization", b"").partition(b" ")
            # Compare with every key, so that the time says nothing.
            fits = [hmac.compare_digest(key.strip(), k) for k in self.api_keys]
            if scheme.lower() != b"bearer" or not any(fits):
                raise ApiError(
                    401, "give this server's API key as Authorization: Bearer KEY",
                    "authentication_error", code="invalid_api_key",
                )  # fmt: skip
        if scope["method"] == "POST":
            kind = headers.get("content-type", b"").split(b";")[0].strip().lower()
            # Pages of other sites can send any other type without asking.
            if kind != b"application/json":
                raise ApiError(415, "send the body as Content-Type: application/json")
            length = headers.get("content-length", b"0")
            if length.isdigit() and int(length) > self.max_body:
                raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request's body is larger than {self.max_body} bytes")


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


async def respond(send: _Send, error: ApiError) -> None:
    """Send an error as an ASGI response."""
    body = json.dumps(error.body()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    if error.status == 413:
        headers["Connection"] = "close"
    headers |= error.headers()
    raw = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
