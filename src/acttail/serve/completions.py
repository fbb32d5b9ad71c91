"""The routes that generate or tokenise: OpenAI's two kinds of completion, and what llama-server adds."""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from acttail.engine.generation import Piece
from acttail.serve.calls import Call
from acttail.serve.errors import ApiError
from acttail.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from acttail.serve.server import Server
from acttail.serve.wording import Wording

# OpenAI's default for a completion that does not say.
_SHORT = 16
# Events of a stream that are sent as one.
_MOST_LINES = 32


def add_completions(app: FastAPI, server: Server) -> None:
    """Add the routes to an application."""

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        server.check_model(body.model)
        ids = await server.prompting.chat(
            [m.plain() for m in body.messages], body.template_arguments,
            goes_on=body.continue_final_message, answer=body.add_generation_prompt,
        )  # fmt: skip
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        limit = -1 if body.limit is None else body.limit
        matcher = await server.matcher(body.schema_asked)
        call = server.call(request, body, [ids], limit, logprobs, matcher=matcher)
        return await _answer(server, body, call, [""] * body.n, chat=True)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        server.check_model(body.model)
        server.check_count(len(body.prompts) * body.n)
        prompts = [await server.prompting.text(p) for p in body.prompts]
        limit = _SHORT if body.max_tokens is None else body.max_tokens
        matcher = await server.matcher(body.schema_asked)
        call = server.call(
            request, body, prompts, limit, body.logprobs, scored=body.scored, matcher=matcher
        )
        echoed = [
            (p if isinstance(p, str) else await server.prompting.decode(p)) if body.echo else ""
            for p in body.prompts
            for _ in range(body.n)
        ]
        return await _answer(server, body, call, echoed, chat=False)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        prompting = server.prompting
        if body.messages is not None:
            ids = await prompting.chat([m.plain() for m in body.messages], {})
        else:
            special = body.add_special or bool(body.add_special_tokens)
            ids = await prompting.bare(body.content or body.prompt or "", special=special)
        found = ids.tolist()
        return {"tokens": found, "count": len(found), "max_model_len": server.engine.context}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        text = await server.prompting.decode(body.tokens)
        return {"content": text, "prompt": text}


async def _answer(
    server: Server, body: ChatRequest | CompletionRequest, call: Call, texts: list[str], *, chat: bool
) -> Response:  # fmt: skip
    """The response to a call, streamed or whole."""
    wording = Wording(server.name, chat=chat, tokenizer=server.engine.tokenizer)
    events = call.events()
    first = await anext(events, None)
    if first is None:  # the client has gone
        return Response(status_code=499)
    if body.stream:
        lines = _lines(wording, call, first, events, texts, server, usage=body.include_usage)
        return StreamingResponse(
            lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
    pieces: list[list[Piece]] = [[] for _ in call.jobs]
    index, piece = first
    if piece is not None:
        pieces[index].append(piece)
    async for index, piece in events:
        if piece is not None:
            pieces[index].append(piece)
    whole = [
        text + "".join(p.text for p in found) for text, found in zip(texts, pieces, strict=True)
    ]
    return JSONResponse(wording.whole(whole, call.jobs, pieces))


async def _lines(
    wording: Wording, call: Call, first: tuple[int, Piece | None],
    events: AsyncIterator[tuple[int, Piece | None]], texts: list[str], server: Server,
    *, usage: bool,
) -> AsyncIterator[str]:  # fmt: skip
    """Server-sent events of a stream."""

    def line(value: Any) -> str:
        return f"data: {json.dumps(value)}\n\n"

    def chunks(index: int, piece: Piece | None) -> list[dict[str, Any]]:
        job = call.jobs[index]
        found = []
        if index in unsaid:  # by its first event a prompt is scored
            unsaid.discard(index)
            found.append(wording.echo(index, texts[index], job))
        if piece is None:
            found.append(wording.chunk(index, "", job, last=True))
        elif piece.text or job.logprobs is not None:
            found.append(wording.chunk(index, piece.text, job, piece if piece.token >= 0 else None))
        return found

    def sends() -> bool:
        # Each text that is yielded costs a way through all layers and a call of the system.
        return bool(lines) and (call.waits or len(lines) >= _MOST_LINES)

    unsaid = {i for i, text in enumerate(texts) if text}

    lines: list[str] = []
    try:
        if wording.chat:
            lines += [
                line(wording.chunk(i, None, job, first=True)) for i, job in enumerate(call.jobs)
            ]
        lines += map(line, chunks(*first))
        if sends():
            yield "".join(lines)
            lines.clear()
        async for event in events:
            lines += map(line, chunks(*event))
            if sends():
                yield "".join(lines)
                lines.clear()
        if usage:
            lines.append(line(wording.usage_chunk(call.jobs)))
        yield "".join([*lines, "data: [DONE]\n\n"])
    except ApiError as error:
        # The status is long sent: the error is the last event, and [DONE] does not come.
        server.metrics.stream_errors.labels(error.status).inc()
        yield "".join([*lines, line(error.body())])
    finally:
        call.cancel()
