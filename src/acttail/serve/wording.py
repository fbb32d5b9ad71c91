"""From generations to the JSON of OpenAI's API."""

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from acttail.engine.generation import Piece
from acttail.serve.scheduler import Job


class Wording:
    """Bodies of one response, of either kind.

    Args:
        model: name in the response.
        chat: whether it answers a conversation.
        tokenizer: of the model.
    """

    def __init__(self, model: str, *, chat: bool, tokenizer: Any) -> None:
        self.chat, self._tokenizer = chat, tokenizer
        self._head: dict[str, Any] = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(
        self, texts: Sequence[str], jobs: Sequence[Job], pieces: Sequence[list[Piece]]
    ) -> Any:
        """A response in one piece."""
        choices = []
        for i, (text, job) in enumerate(zip(texts, jobs, strict=True)):
            choice: dict[str, Any] = {"index": i, "finish_reason": finish(job)}
            choice["logprobs"] = self._logprobs(pieces[i], job)
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

    def usage_chunk(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The event that ends a stream with include_usage."""
        body: dict[str, Any] = self._head | {"choices": [], "usage": usage(jobs)}
        if self.chat:
            body["object"] = "chat.completion.chunk"
        return body

    def _logprobs(self, pieces: Sequence[Piece], job: Job) -> dict[str, Any] | None:
        if job.logprobs is None:
            return None
        drawn = [p for p in pieces if p.token >= 0 and p.logprob is not None]
        if self.chat:
            content = [
                self._token(p.token, p.logprob)
                | {"top_logprobs": [self._token(t, v) for t, v in p.top]}
                for p in drawn
            ]
            return {"content": content, "refusal": None}
        names = [self._name(p.token) for p in drawn]
        offsets, at = [], 0
        for name in names:
            offsets.append(at)
            at += len(name)
        return {
            "tokens": names,
            "token_logprobs": [p.logprob for p in drawn],
            "top_logprobs": [{self._name(t): v for t, v in p.top} for p in drawn],
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
    """Token counts; a prompt with several choices counts once per choice it was read for."""
    prompt = sum(len(job.prompt) for job in jobs)
    completion = sum(len(job.result.tokens) for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(job.held for job in jobs)},
    }


def timings(jobs: Sequence[Job]) -> dict[str, Any]:
    """Our own field of a response: how fast, and how sparse."""
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
    }


def realised(engine: Any, read: float | None) -> float | None:
    """Share of the projections' inputs dropped while decoding.

    Args:
        engine: that decoded.
        read: share of the projections' weights it read, None if nothing was decoded. TopK drops what
            the plan says, even where a dense kernel reads every weight; a threshold drops what it meets.
    """
    if engine.plan is None or engine.plan.rule in ("topk", "wina"):
        return round(engine.plan.realised_sparsity, 4) if engine.plan else 0.0
    return None if read is None else round(1 - read, 4)
