"""The HTTP application: OpenAI's completions, models, health, metrics and a chat page."""

import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from acttail._version import __version__
from acttail.curves import SensitivityCurves
from acttail.engine.generation import Piece
from acttail.errors import ActTailError
from acttail.serve.calls import Call
from acttail.serve.errors import ApiError
from acttail.serve.limits import Gate
from acttail.serve.metrics import Metrics
from acttail.serve.scheduler import Scheduler, check_room
from acttail.serve.schemas import ChatRequest, CompletionRequest
from acttail.serve.variants import Variants
from acttail.serve.wording import Wording

_LOG = logging.getLogger("acttail.serve")
# The page runs its own script and style, talks to this server, and nothing else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_STATIC = {
    "/": ("chat.html", "text/html; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/chat.css": ("chat.css", "text/css; charset=utf-8"),
}


@dataclass(frozen=True)
class Options:
    """What a server allows.

    Attributes:
        name: of the model in the API; the engine's source by default.
        api_keys: one of them must be given under /v1; open without any.
        hosts: names the Host header may have; None for any.
        slots: generations at once.
        queue: requests that may wait.
        per_client: requests one client may have waiting or running.
        wait_seconds: longest wait for a slot.
        run_seconds: longest generation.
        max_body: bytes of a request.
        max_tokens: new tokens of a request at most, and where a chat request does not say.
        keep_prefixes: go on from the KV cache of an earlier request that began alike.
    """

    name: str | None = None
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    slots: int = 8
    queue: int = 128
    per_client: int = 128
    wait_seconds: float = 300.0
    run_seconds: float = 600.0
    max_body: int = 1 << 20
    max_tokens: int = 2048
    keep_prefixes: bool = True


class _Server:
    """What the routes share."""

    def __init__(self, engine: Any, options: Options, curves: SensitivityCurves | None) -> None:
        self.engine, self.options = engine, options
        self.name = options.name or engine.source
        self.variants = Variants(engine, curves)
        self.metrics = Metrics(engine)
        self.scheduler = Scheduler(
            slots=options.slots, queue=options.queue, per_client=options.per_client,
            wait_seconds=options.wait_seconds, run_seconds=options.run_seconds,
            threads=getattr(engine, "threads", None),
            keep_prefixes=options.keep_prefixes, on_token=self.metrics.token,
        )  # fmt: skip
        self.metrics.watch(self.scheduler)

    def about(self) -> dict[str, Any]:
        """What the page and scripts may want to know."""
        plan = self.engine.plan
        return {
            "model": self.name, "engine": self.engine.name, "dtype": self.engine.dtype, "version": __version__,
            "context": self.engine.context, "sparsity": self.variants.default,
            "allocator": plan.allocator if plan else None, "rule": plan.rule if plan else None,
            "adjustable": self.variants.fixed is None, "fixed_because": self.variants.fixed,
            "chat": bool(getattr(self.engine.tokenizer, "chat_template", None)),
            "max_tokens": self.options.max_tokens,
        }  # fmt: skip

    def model(self) -> dict[str, Any]:
        """This model in OpenAI's form."""
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "acttail"}

    def call(
        self, request: Request, body: ChatRequest | CompletionRequest, prompts: Sequence[torch.Tensor],
        limit: int, logprobs: int | None,
    ) -> Call:  # fmt: skip
        """Queue what a request asks for.

        Raises:
            ApiError: it asks for more than there is.
        """
        engine = self.variants.at(body.sparsity)
        if limit > self.options.max_tokens:
            raise ApiError(
                400, f"this server gives at most {self.options.max_tokens} tokens, not {limit}",
                param="max_tokens",
            )  # fmt: skip
        client = request.headers.get("authorization") or (
            request.client.host if request.client else ""
        )
        call = Call(self.scheduler, self.metrics, request.is_disconnected)
        for ids in prompts:
            try:
                check_room(engine, len(ids), limit)
            except ActTailError as error:
                raise ApiError(400, str(error), code="context_length_exceeded") from error
            for i in range(body.n):
                call.add(
                    engine=engine, prompt=ids, client=client, max_new_tokens=limit, sampling=body.sampling(i),
                    stop=tuple(body.stops), logprobs=logprobs,
                )  # fmt: skip
        call.submit()
        return call

    def check_model(self, name: str) -> None:
        """Only one model is served.

        Raises:
            ApiError: another was asked for.
        """
        if name != self.name:
            raise ApiError(
                404, f"the model {name!r} is not served here; use {self.name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    def room(self, ids: torch.Tensor) -> int:
        """Tokens a chat answer may have where the request does not say."""
        return max(1, min(self.options.max_tokens, int(self.engine.context) - len(ids)))


def create_app(
    engine: Any, options: Options | None = None, *, curves: SensitivityCurves | None = None
) -> FastAPI:
    """Make the application.

    Args:
        engine: of :mod:`acttail.engine`, with a tokenizer.
        options: what it allows.
        curves: sensitivity curves of the model, so that requests may choose their sparsity.

    Raises:
        ActTailError: the engine has no tokenizer.
    """
    if engine.tokenizer is None:
        raise ActTailError("the model has no tokenizer: a server needs one")
    options = options or Options()
    server = _Server(engine, options, curves)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.scheduler.stop()

    # No interactive API pages: they load scripts from elsewhere.
    app = FastAPI(
        title="acttail", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.server = server
    _add_errors(app)
    _add_plain(app, server)
    _add_completions(app, server)
    app.add_middleware(
        Gate, max_body=options.max_body, api_keys=options.api_keys, hosts=options.hosts
    )
    return app


def _add_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(ApiError)
    async def api(_: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(ActTailError)
    async def ours(_: Request, error: ActTailError) -> JSONResponse:
        return answer(ApiError(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Of several ways to read a field, the one that went furthest is the one that was meant.
        first = max(error.errors(), key=lambda e: len(e["loc"]))
        parts = [str(part) for part in first["loc"]]
        field = ".".join(p for p in parts if p not in ("body", "str") and "[" not in p)
        message = str(first["msg"]).removeprefix("Value error, ")
        text = f"{field}: {message}" if field else message
        return answer(ApiError(400, text, param=field or None))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(ApiError(error.status_code, f"{request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def internal(_: Request, error: Exception) -> JSONResponse:
        _LOG.error("internal error", exc_info=error)
        return answer(ApiError(500, "internal error; see the server's log", "server_error"))


def _add_plain(app: FastAPI, server: _Server) -> None:
    folder = files("acttail.serve") / "static"
    for path, (name, kind) in _STATIC.items():
        content = (folder / name).read_bytes()

        async def page(content: bytes = content, kind: str = kind) -> Response:
            headers = {
                "Content-Security-Policy": _POLICY,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-cache",
            }
            return Response(content, media_type=kind, headers=headers)

        app.get(path, include_in_schema=False)(page)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "waiting": server.scheduler.waiting,
            "running": server.scheduler.running,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/about")
    async def about() -> dict[str, Any]:
        return server.about()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return server.model()


def _add_completions(app: FastAPI, server: _Server) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        server.check_model(body.model)
        ids = server.engine.encode_chat([m.plain() for m in body.messages])
        limit = body.max_completion_tokens or body.max_tokens or server.room(ids)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        call = server.call(request, body, [ids], limit, logprobs)
        return await _answer(server, body, call, [""] * body.n, chat=True)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        server.check_model(body.model)
        prompts = [
            server.engine.encode(p) if isinstance(p, str) else torch.tensor(p, dtype=torch.int64)
            for p in body.prompts
        ]
        limit = 16 if body.max_tokens is None else body.max_tokens
        if limit < 1:
            raise ApiError(400, "max_tokens must be at least 1", param="max_tokens")
        call = server.call(request, body, prompts, limit, body.logprobs)
        echoed = [
            (p if isinstance(p, str) else server.engine.tokenizer.decode(p)) if body.echo else ""
            for p in body.prompts
            for _ in range(body.n)
        ]
        return await _answer(server, body, call, echoed, chat=False)


async def _answer(
    server: _Server, body: ChatRequest | CompletionRequest, call: Call, texts: list[str], *, chat: bool
) -> Response:  # fmt: skip
    """The response to a call, streamed or whole."""
    wording = Wording(server.name, chat=chat, tokenizer=server.engine.tokenizer)
    events = call.events()
    try:
        first = await anext(events, None)
    except ApiError as error:
        server.metrics.requests.labels(_path(chat=chat), error.status).inc()
        raise
    if first is None:  # the client has gone
        return Response(status_code=499)
    if body.stream:
        server.metrics.requests.labels(_path(chat=chat), 200).inc()
        lines = _lines(wording, call, first, events, texts, usage=body.include_usage)
        return StreamingResponse(
            lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
    pieces: list[list[Piece]] = [[] for _ in call.jobs]
    status = 200
    try:
        index, piece = first
        if piece is not None:
            pieces[index].append(piece)
        async for index, piece in events:
            if piece is not None:
                pieces[index].append(piece)
    except ApiError as error:
        status = error.status
        raise
    finally:
        server.metrics.requests.labels(_path(chat=chat), status).inc()
    whole = [
        text + "".join(p.text for p in found) for text, found in zip(texts, pieces, strict=True)
    ]
    return JSONResponse(wording.whole(whole, call.jobs, pieces))


def _path(*, chat: bool) -> str:
    return "/v1/chat/completions" if chat else "/v1/completions"


async def _lines(
    wording: Wording, call: Call, first: tuple[int, Piece | None], events: Any, texts: list[str], *, usage: bool
) -> AsyncIterator[str]:  # fmt: skip
    """Server-sent events of a stream."""

    def line(value: Any) -> str:
        return f"data: {json.dumps(value)}\n\n"

    def chunks(index: int, piece: Piece | None) -> list[dict[str, Any]]:
        job = call.jobs[index]
        if piece is None:
            return [wording.chunk(index, "", job, last=True)]
        if piece.text or job.logprobs is not None:
            return [wording.chunk(index, piece.text, job, piece if piece.token >= 0 else None)]
        return []

    try:
        for index, job in enumerate(call.jobs):
            if wording.chat:
                yield line(wording.chunk(index, None, job, first=True))
            elif texts[index]:
                yield line(wording.chunk(index, texts[index], job))
        for chunk in chunks(*first):
            yield line(chunk)
        async for event in events:
            for chunk in chunks(*event):
                yield line(chunk)
        if usage:
            yield line(wording.usage_chunk(call.jobs))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield line(error.body())
    finally:
        call.cancel()
