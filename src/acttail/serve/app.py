"""The HTTP application: OpenAI's completions, models, health, metrics and a chat page."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from acttail._version import __version__
from acttail.base.memory import give_back
from acttail.calibrate.curves import SensitivityCurves
from acttail.engine import Engine
from acttail.errors import ActTailError
from acttail.serve.completions import add_completions
from acttail.serve.errors import ApiError
from acttail.serve.guard import guard
from acttail.serve.server import Options, Server

_LOG = logging.getLogger("acttail.serve")
# The page runs its own script and style, talks to this server, and nothing else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Requests come and go on several threads, and glibc keeps what each freed in heaps of their own: without this a server
# grew by 1 kB a request (benchmarks/reliability.csv).
_TRIM_SECONDS = 30.0
_STATIC = {
    "/": ("chat.html", "text/html; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/chat.css": ("chat.css", "text/css; charset=utf-8"),
}


def create_app(
    engine: Engine, options: Options | None = None, *, curves: SensitivityCurves | None = None
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
    server = Server(engine, options, curves)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        trimming = asyncio.create_task(_trim(server))
        yield
        trimming.cancel()
        server.scheduler.stop()

    # No interactive API pages: they load scripts from elsewhere.
    app = FastAPI(
        title="acttail", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.server = server
    _add_errors(app)
    _add_plain(app, server)
    add_completions(app, server)
    guard(app, options, server.metrics.response)
    return app


async def _trim(server: Server) -> None:
    """Give back what requests freed, as long as there are any."""
    seen = 0
    while True:
        await asyncio.sleep(_TRIM_SECONDS)
        if (count := server.metrics.answered) != seen:
            seen = count
            await asyncio.to_thread(give_back)


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
        return answer(_worded(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(ApiError(error.status_code, _line(f"{request.url.path}: {error.detail}")))

    @app.exception_handler(Exception)
    async def internal(_: Request, error: Exception) -> JSONResponse:
        _LOG.error("internal error", exc_info=error)
        return answer(ApiError(500, "internal error; see the server's log", "server_error"))


def _worded(errors: Sequence[Any]) -> ApiError:
    """What pydantic found, as one line that names the field."""
    for found in errors:
        if found["type"] == "json_invalid":
            why = found.get("ctx", {}).get("error", found["msg"])
            return ApiError(400, _line(f"the body is no valid JSON: {why}"))
        if found["type"] == "refused":
            return ApiError(400, _line(found["ctx"]["text"]), param=found["ctx"]["param"])
    # Of several ways to read a field, the one that went furthest is the one that was meant.
    first = max(errors, key=lambda e: len(e["loc"]))
    parts = [p for p in first["loc"] if p not in ("body", "str", "[key]")]
    # Names of union members stand between a field and its index.
    parts = [p for p in parts if isinstance(p, int) or "[" not in p]
    field = _line(".".join(map(str, parts)))[:200]
    message = str(first["msg"]).removeprefix("Value error, ")
    if not parts and first["type"] in (
        "missing",
        "model_attributes_type",
        "dict_type",
        "model_type",
    ):
        message = "the body is to be a JSON object"
    return ApiError(400, _line(f"{field}: {message}" if field else message), param=field or None)


def _line(text: str) -> str:
    """Text as one line that any encoding takes."""
    return " ".join(text.encode("utf-8", "replace").decode().split())[:1000]


def _add_plain(app: FastAPI, server: Server) -> None:
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

    @app.head("/health", include_in_schema=False)
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
