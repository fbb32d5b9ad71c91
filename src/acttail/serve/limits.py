"""What a request must pass before it is read: its host, its key, its kind, its size, its deadline."""

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from acttail.serve.errors import ApiError

_Message = MutableMapping[str, Any]
_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Where the gate leaves whom a request is counted for.
CLIENT = "acttail.client"


class Counted:
    """ASGI middleware, the outermost: every response is counted, whoever gave it.

    Args:
        app: what comes after.
        count: called with (path, status).
    """

    def __init__(self, app: Any, *, count: Callable[[str, int], None]) -> None:
        self.app, self.count = app, count

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Hand the request on and note the status it gets."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def noted(message: _Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.count(scope["path"], message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception:
            if not started:  # the server beneath answers it
                self.count(scope["path"], 500)
            raise


class Gate:
    """ASGI middleware that refuses before anything is parsed, and reads the body within a deadline.

    Args:
        app: what comes after; it gets the body in one piece.
        max_body: bytes.
        body_seconds: that a body may take to arrive.
        api_keys: one of them must come as a bearer token under /v1; none for an open server.
        hosts: names the Host header may have; None for any. On loopback it keeps out pages of other
            sites that point their name at this machine (DNS rebinding).
        proxies: addresses or networks of proxies whose X-Forwarded-For is believed.
    """

    def __init__(
        self, app: Any, *, max_body: int, body_seconds: float, api_keys: tuple[str, ...],
        hosts: tuple[str, ...] | None, proxies: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.app, self.max_body, self.body_seconds = app, max_body, body_seconds
        self.api_keys = [k.encode() for k in api_keys]
        self.hosts = hosts
        self.proxies = [ipaddress.ip_network(p, strict=False) for p in proxies]

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Refuse the request or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: dict[str, bytes] = {}
        for name, value in scope["headers"]:
            key = name.decode("latin-1").lower()
            headers[key] = headers[key] + b", " + value if key in headers else value
        try:
            scope[CLIENT] = self._check(scope, headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await respond(send, error)
            return
        if body is None:  # the client has gone
            return
        given = False

        async def replayed() -> _Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replayed, send)

    async def _body(self, headers: dict[str, bytes], receive: _Receive) -> bytes | None:
        """The whole body; None if the client went before it was there."""
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return b""

        async def read() -> bytes | None:
            found = bytearray()
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                found += message.get("body", b"")
                if len(found) > self.max_body:  # a chunked body has no length to refuse it by
                    raise self._too_large()
                if not message.get("more_body", False):
                    return bytes(found)

        try:
            return await asyncio.wait_for(read(), self.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"the request's body did not arrive in {self.body_seconds:g} s"
            ) from None

    def _check(self, scope: _Scope, headers: dict[str, bytes]) -> str:
        """Whom the request is counted for: the key it came with, else its address."""
        host = headers.get("host", b"").decode("latin-1")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise ApiError(421, f"this server does not answer to the host name {host[:200]!r}")
        if "content-length" in headers and "transfer-encoding" in headers:
            # Two lengths: a proxy before us may have believed the other one.
            raise ApiError(400, "give Content-Length or Transfer-Encoding, not both")
        client = "address " + self._address(scope, headers)
        path = scope["path"]
        if self.api_keys:
            scheme, _, key = headers.get("authorization", b"").partition(b" ")
            # Compare with every key, so that the time says nothing.
            fits = [hmac.compare_digest(key.strip(), k) for k in self.api_keys]
            if scheme.lower() == b"bearer" and any(fits):
                client = f"key {fits.index(True)}"
            elif path.startswith("/v1") or path in ("/tokenize", "/detokenize"):
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
        # h11 has checked that it is a number of at most twenty digits.
        if length.isdigit() and int(length) > self.max_body:
            raise self._too_large()
        return client

    def _address(self, scope: _Scope, headers: dict[str, bytes]) -> str:
        """The client's address: the last one that no proxy of ours has."""
        found = str((scope.get("client") or ("",))[0])
        if not self.proxies:
            return found
        forwarded = headers.get("x-forwarded-for", b"").decode("latin-1")
        for name in reversed([*map(str.strip, forwarded.split(",")), found]):
            try:
                address = ipaddress.ip_address(name)
            except ValueError:
                return found
            found = name
            if not any(address in network for network in self.proxies):
                return found
        return found

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request's body is larger than {self.max_body} bytes")


def check_proxies(names: Sequence[str]) -> None:
    """Refuse what is no address.

    Raises:
        ValueError: names the first that is neither an address nor a network.
    """
    for name in names:
        ipaddress.ip_network(name, strict=False)


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


async def respond(send: _Send, error: ApiError) -> None:
    """Send an error as an ASGI response."""
    # What is left of the request on the wire may be long, late or not what it says.
    body, headers = error.whole(closes=error.status in (400, 401, 408, 413, 415, 421))
    raw = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
