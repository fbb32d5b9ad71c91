"""From generations to the JSON of OpenAI's API."""

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from acttail.engine.generation import Piece
from acttail.engine.protocol import TokenEngine
from acttail.serve.jobs import Job
from acttail.sparse.rules import kind_of


class Wording:
    """Bodies of one response, of either kind.

    Args:
        model: name in the response.
        chat: whether it answers a conversation.
        tokenizer: of the model.
    """

    def __init__(self, model: str, *, chat: bool, tokenizer: Any) -> None:
        self.chat, self._tokenizer = chat, tokenizer
        # Characters of token names that a stream has given so far, by job.
        self._said: dict[int, int] = {}
        self._head: dict[str, Any] = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(
        self, texts: Sequence[str], jobs: Sequence[Job], pieces: Sequence[list[Piece]]
    ) -> dict[str, Any]:
        """A response in one piece."""
        choices = []
        for i, (text, job) in enumerate(zip(texts, jobs, strict=True)):
            choice: dict[str, Any] = {"index": i, "finish_reason": finish(job)}
            choice["logprobs"] = self._logprobs(pieces[i], job, offset=0)
            if self.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choices.append(choice)
        return self._head | {"choices": choices, "usage": usage(jobs), "acttail": timings(jobs)}

    def chunk(
        self, index: int, text: str | None, job: Job, piece: Piece | None = None, *, first: bool = False,
        last: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """One event of a stream."""
        choice: dict[str, Any] = {"index": index, "finish_reason": finish(job) if last else None}
        choice["logprobs"] = self._logprobs([piece], job) if piece is not None else None
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
            choice["delta"] = delta | ({"content": text} if text is not None and not last else {})
        else:
            choice["text"] = text or ""
        body: dict[str, Any] = self._head | {"choices": [choice]}
        if self.chat:
            body["object"] = "chat.completion.chunk"
        if last:
            body["acttail"] = timings([job])
        return body

    def echo(self, index: int, text: str, job: Job) -> dict[str, Any]:
        """The event of a stream that gives the prompt back, scored if that was asked for."""
        choice = {
            "index": index,
            "finish_reason": None,
            "logprobs": self._logprobs([], job, offset=0),
            "text": text,
        }
        return self._head | {"choices": [choice]}

    def usage_chunk(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The event that ends a stream with include_usage."""
        body: dict[str, Any] = self._head | {"choices": [], "usage": usage(jobs)}
        if self.chat:
            body["object"] = "chat.completion.chunk"
        return body

    def _logprobs(
        self, pieces: Sequence[Piece], job: Job, *, offset: int | None = None
    ) -> dict[str, Any] | None:
        """Log-probabilities of the pieces; at an offset of 0 those of a scored prompt come first."""
        if job.logprobs is None:
            return None
        drawn = [(p.token, p.logprob, p.top) for p in pieces if p.token >= 0]
        if self.chat:
            content = [
                self._token(t, v) | {"top_logprobs": [self._token(i, w) for i, w in top]}
                for t, v, top in drawn
            ]
            return {"content": content, "refusal": None}
        if job.scored and offset == 0:
            scores = [(None, ()), *job.scores]
            prompt = job.prompt.tolist()
            drawn = [(t, v, top) for t, (v, top) in zip(prompt, scores, strict=True)] + drawn
        names = [self._name(t) for t, _, _ in drawn]
        offsets, at = [], self._said.get(id(job), 0) if offset is None else offset
        for name in names:
            offsets.append(at)
            at += len(name)
        self._said[id(job)] = at
        return {
            "tokens": names,
            "token_logprobs": [v for _, v, _ in drawn],
            # A prompt's first token follows nothing, so it has no probability.
            "top_logprobs": [
                None if v is None else {self._name(i): w for i, w in top} for _, v, top in drawn
            ],
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        text = str(self._tokenizer.decode([token]))
        # Part of a character has no text of its own; several of them must still differ.
        return str(self._tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = self._name(token)
        whole = "\ufffd" not in str(self._tokenizer.decode([token]))
        return {
            "token": name,
            "logprob": logprob,
            "bytes": list(name.encode()) if whole else None,
        }


def finish(job: Job) -> str:
    """Why a generation ended; one cut off by the time limit ended by its length."""
    return "stop" if job.result.finish == "stop" else "length"


def usage(jobs: Sequence[Job]) -> dict[str, Any]:
    """Token counts; a prompt with several choices counts once, as OpenAI counts it."""
    # The choices of one prompt share its tensor; what the cache held of it counts for the first of them.
    first = {id(job.prompt): job for job in reversed(jobs)}.values()
    prompt = sum(len(job.prompt) for job in first)
    completion = sum(len(job.result.tokens) for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(job.held for job in first)},
    }


def timings(jobs: Sequence[Job]) -> dict[str, Any]:
    """Our own field of a response: how fast, how sparse, and what became of drafts where it is lossless."""
    speeds = [job.result.tokens_per_second for job in jobs if len(job.result.tokens) > 1]
    shares = [job.read_share for job in jobs if not math.isnan(job.read_share)]
    engine = jobs[0].engine
    return {
        "engine": engine.name,
        "dtype": engine.dtype,
        "sparsity": engine.plan.sparsity if engine.plan else 0.0,
        "realised_sparsity": realised(engine, sum(shares) / len(shares) if shares else None),
        "weights_read": round(sum(shares) / len(shares), 4) if shares else None,
        "tokens_per_second": round(sum(speeds) / len(speeds), 2) if speeds else None,
        "prefill_seconds": round(max(job.result.prefill_seconds for job in jobs), 4),
        **drafting(jobs),
    }


def drafting(jobs: Sequence[Job]) -> dict[str, Any]:
    """Whether the text is the dense model's by verified drafts, and how many of them were kept."""
    drafts = [job.result.drafts for job in jobs if job.result.drafts is not None]
    if not drafts:
        return {"lossless": False}
    drafted, accepted = sum(d.drafted for d in drafts), sum(d.accepted for d in drafts)
    return {
        "lossless": True,
        "drafted": drafted,
        "accepted": accepted,
        "acceptance": round(accepted / drafted, 4) if drafted else None,
    }


def realised(engine: TokenEngine, read: float | None) -> float | None:
    """Share of the projections' inputs dropped while decoding.

    Args:
        engine: that decoded.
        read: share of the projections' weights it read, None if nothing was decoded. TopK drops what
            the plan says, even where a dense kernel reads every weight; a threshold drops what it meets.
    """
    plan = engine.plan
    if plan is None:
        return 0.0
    if kind_of(plan).fixed_k:
        return round(plan.realised_sparsity, 4)
    return None if read is None else round(1 - read, 4)
