"""What the routes share: the engine, what is allowed, the queue and the counters."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import Request

from acttail._version import __version__
from acttail.base.machine import memory_bytes
from acttail.calibrate.curves import SensitivityCurves
from acttail.engine import Engine
from acttail.engine.protocol import PAGE
from acttail.engine.variants import Variants
from acttail.errors import ActTailError
from acttail.serve.calls import Call, Mailbox
from acttail.serve.errors import ApiError
from acttail.serve.grammars import Grammar, Grammars, Matcher
from acttail.serve.limits import CLIENT
from acttail.serve.memory import KvMemory, check_room, tokens_within
from acttail.serve.metrics import Metrics
from acttail.serve.prompting import Prompting
from acttail.serve.scheduler import Scheduler
from acttail.serve.schemas import ChatRequest, CompletionRequest

# Generations one request may ask for (prompts x n).
_MAX_CHOICES = 64


@dataclass(frozen=True)
class Options:
    """What a server allows.

    Attributes:
        name: of the model in the API; the engine's source by default.
        api_keys: one of them must be given under /v1; open without any.
        hosts: names the Host header may have; None for any.
        slots: generations at once.
        kv_bytes: memory of all KV caches together; None for a quarter of the machine's.
        queue: requests that may wait.
        per_client: requests one client may have waiting or running.
        wait_seconds: longest wait for a slot.
        run_seconds: longest generation.
        max_body: bytes of a request.
        max_tokens: new tokens of a request at most, and where a chat request does not say.
        keep_prefixes: go on from the KV cache of an earlier request of the same client that began alike.
        body_seconds: that a request's body may take to arrive.
        prompt_seconds: that tokenising a request, its chat template included, may take.
        proxies: addresses or networks of proxies whose X-Forwarded-For names the client.
        origins: web pages (``https://name``) that may call from a browser; ``*`` for all.
        special_tokens: whether a message's content may hold special tokens; they are plain text else.
    """

    name: str | None = None
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    slots: int = 64
    kv_bytes: int | None = None
    queue: int = 128
    per_client: int = 128
    wait_seconds: float = 300.0
    run_seconds: float = 600.0
    max_body: int = 1 << 20
    max_tokens: int = 2048
    keep_prefixes: bool = True
    body_seconds: float = 30.0
    prompt_seconds: float = 10.0
    proxies: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    special_tokens: bool = False


class Server:
    """What the routes share."""

    def __init__(self, engine: Engine, options: Options, curves: SensitivityCurves | None) -> None:
        self.engine, self.options = engine, options
        self.name = options.name or engine.source
        self.created = int(time.time())
        self.variants = Variants(engine, curves)
        self.metrics = Metrics(engine)
        if options.kv_bytes is not None and not engine.counts_memory:
            raise ActTailError(
                f"the {engine.name} engine does not count the memory of KV caches: leave --kv-memory out"
            )
        limit = options.kv_bytes or memory_bytes() // 4
        self.most_tokens = tokens_within(engine, limit)
        if self.most_tokens < 2 * PAGE:
            raise ActTailError(
                f"{limit} bytes of KV memory hold {self.most_tokens} tokens; give at least {2 * PAGE} (--kv-memory)"
            )
        self._mailbox: tuple[asyncio.AbstractEventLoop, Mailbox] | None = None
        self.scheduler = Scheduler(
            slots=options.slots, queue=options.queue, per_client=options.per_client,
            wait_seconds=options.wait_seconds, run_seconds=options.run_seconds,
            threads=engine.threads,
            keep_prefixes=options.keep_prefixes, memory=KvMemory(limit, lambda: engine.kv_bytes),
            on_token=self.metrics.token, on_preempted=self.metrics.preempted, on_drafts=self.metrics.drafts,
            on_events=self._deliver,
        )  # fmt: skip
        self.metrics.watch(self.scheduler)
        self.prompting = Prompting(
            engine, seconds=options.prompt_seconds, special_tokens=options.special_tokens
        )
        self.grammars = Grammars(engine)
        self._preparing: asyncio.Lock | None = None

    def _deliver(self) -> None:
        """Hand on what jobs have emitted; called from the scheduler's thread."""
        if self._mailbox is not None:
            self._mailbox[1].wake()

    def _mail(self) -> Mailbox:
        """The mailbox of the loop that runs this."""
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox[0] is not loop:
            self._mailbox = loop, Mailbox(loop)
        return self._mailbox[1]

    def about(self) -> dict[str, Any]:
        """What the page and scripts may want to know."""
        plan = self.engine.plan
        return {
            "model": self.name, "engine": self.engine.name, "dtype": self.engine.dtype, "version": __version__,
            "context": self.engine.context, "sparsity": self.variants.default,
            "allocator": plan.allocator if plan else None, "rule": plan.rule if plan else None,
            "lossless": self.engine.drafters is not None, "drafters": self.engine.drafters,
            "adjustable": self.variants.fixed is None, "fixed_because": self.variants.fixed,
            "chat": bool(getattr(self.engine.tokenizer, "chat_template", None)),
            "max_tokens": self.options.max_tokens,
        }  # fmt: skip

    def model(self) -> dict[str, Any]:
        """This model in OpenAI's form."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "acttail"}

    def call(
        self, request: Request, body: ChatRequest | CompletionRequest, prompts: Sequence[torch.Tensor],
        limit: int, logprobs: int | None, *, scored: bool = False, matcher: Matcher | None = None,
    ) -> Call:  # fmt: skip
        """Queue what a request asks for.

        Args:
            request: whose client it is counted for.
            body: what it asks for.
            prompts: [n] token ids each.
            limit: new tokens; -1 for as many as there is room for. More than the context or this server
                gives is cut to that, and the finish reason says so.
            logprobs: log-probabilities of so many likeliest tokens; None for none.
            matcher: what the answers are held to.
            scored: whether those of the prompts' tokens are wanted, too.

        Raises:
            ApiError: it asks for more than there is.
        """
        self.check_count(len(prompts) * body.n)
        engine = self._variant(body.sparsity)
        for token in body.logit_bias or {}:
            self.prompting.checked([token], "logit_bias")
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        call = Call(self.scheduler, self._mail(), self.metrics, request.receive)
        for ids in prompts:
            try:
                room = min(check_room(engine, len(ids), self.most_tokens), self.options.max_tokens)
            except ActTailError as error:
                raise ApiError(
                    400, str(error), param=param, code="context_length_exceeded"
                ) from error
            for i in range(body.n):
                call.add(
                    engine=engine, prompt=ids, client=request.scope[CLIENT],
                    max_new_tokens=room if limit < 0 else min(limit, room), sampling=body.sampling(i),
                    stop=tuple(body.stops), logprobs=logprobs, scored=scored,
                    constraint=None if matcher is None else matcher.copy(),
                )  # fmt: skip
        call.submit()
        return call

    async def matcher(self, grammar: Grammar | None) -> Matcher | None:
        """What holds an answer to a grammar; None without one.

        Raises:
            ApiError: the grammar cannot be used, or what checks it is not installed.
        """
        if grammar is None:
            return None
        lock = self._preparing = self._preparing or asyncio.Lock()
        try:
            # Beyond the deadline of a request's text, and in one thread however many wait.
            async with lock:
                await asyncio.to_thread(self.grammars.prepare, grammar.param)
        except ActTailError as error:
            raise ApiError(400, str(error), param=grammar.param) from error
        return await self.prompting.run(lambda: self.grammars.matcher(grammar), grammar.param)

    def _variant(self, sparsity: float | None) -> Engine:
        try:
            return self.variants.at(sparsity)
        except ActTailError as error:
            raise ApiError(400, str(error), param="sparsity") from error

    def check_count(self, choices: int) -> None:
        """Refuse more generations than one request may ask for.

        Raises:
            ApiError: there are more.
        """
        if choices > _MAX_CHOICES:
            raise ApiError(400, f"prompts times n is more than {_MAX_CHOICES}", param="n")

    def close(self, seconds: float) -> None:
        """Take no more requests; those that run end within so many seconds."""
        self.scheduler.close(seconds)

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
