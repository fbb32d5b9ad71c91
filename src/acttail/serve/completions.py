"""The routes that generate or tokenise: OpenAI's two kinds of completion, and what llama-server adds."""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from acttail.engine.generation import Piece
from acttail.serve.calls import Call
from acttail.serve.errors import ApiError
from acttail.serve.grammars import Grammar, grammar_of_schema
from acttail.serve.messages import plain_messages
from acttail.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from acttail.serve.server import Server
from acttail.serve.tool_grammars import grammar_of
from acttail.serve.wording import ToolWording, Wording

# OpenAI's default for a completion that does not say.
_SHORT = 16
# Events of a stream that are sent as one.
_MOST_LINES = 32


def add_completions(app: FastAPI, server: Server) -> None:
    """Add the routes to an application."""

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        server.check_model(body.model)
        use = body.tool_use
        ids = await server.prompting.chat(
            plain_messages(body.messages), body.template_arguments, goes_on=body.continue_final_message,
            answer=body.add_generation_prompt, tools=() if use is None else use.shown,
        )  # fmt: skip
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        limit = -1 if body.limit is None else body.limit
        if use is None:
            grammar, tools = _grammar(body), None
        else:
            form = await server.prompting.call_form()
            grammar = grammar_of(use, form, body.schema_asked)
            tools = ToolWording(form, use.forced, use.named)
        matcher = await server.matcher(grammar)
        call = server.call(request, body, [ids], limit, logprobs, matcher=matcher)
        wording = Wording(server.name, chat=True, tokenizer=server.engine.tokenizer, tools=tools)
        return await _answer(server, body, call, [""] * body.n, wording)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        server.check_model(body.model)
        server.check_count(len(body.prompts) * body.n)
        prompts = [await server.prompting.text(p) for p in body.prompts]
        limit = _SHORT if body.max_tokens is None else body.max_tokens
        matcher = await server.matcher(_grammar(body))
        call = server.call(
            request, body, prompts, limit, body.logprobs, scored=body.scored, matcher=matcher
        )
        echoed = [
            (p if isinstance(p, str) else await server.prompting.decode(p)) if body.echo else ""
            for p in body.prompts
            for _ in range(body.n)
        ]
        wording = Wording(server.name, chat=False, tokenizer=server.engine.tokenizer)
        return await _answer(server, body, call, echoed, wording)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        prompting = server.prompting
        if body.messages is not None:
            shown = [tool.plain() for tool in body.tools]
            ids = await prompting.chat(plain_messages(body.messages), {}, tools=shown)
        else:
            special = body.add_special or bool(body.add_special_tokens)
            ids = await prompting.bare(body.content or body.prompt or "", special=special)
        found = ids.tolist()
        return {"tokens": found, "count": len(found), "max_model_len": server.engine.context}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        text = await server.prompting.decode(body.tokens)
        return {"content": text, "prompt": text}


def _grammar(body: ChatRequest | CompletionRequest) -> Grammar | None:
    """What an answer without tools is held to."""
    return None if body.schema_asked is None else grammar_of_schema(body.schema_asked)


async def _answer(
    server: Server, body: ChatRequest | CompletionRequest, call: Call, texts: list[str], wording: Wording
) -> Response:  # fmt: skip
    """The response to a call, streamed or whole."""
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
        found += wording.last(index, job) if piece is None else wording.chunks(index, piece, job)
        return found

    def sends() -> bool:
        # Each text that is yielded costs a way through all layers and a call of the system.
        return bool(lines) and (call.waits or len(lines) >= _MOST_LINES)

    unsaid = {i for i, text in enumerate(texts) if text}

    lines: list[str] = []
    try:
        if wording.chat:
            lines += [line(wording.first(i)) for i in range(len(call.jobs))]
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
