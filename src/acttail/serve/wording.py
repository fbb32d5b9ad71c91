"""From generations to the JSON of OpenAI's API."""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from acttail.engine.generation import Piece
from acttail.engine.protocol import TokenEngine
from acttail.serve.call_form import CallForm
from acttail.serve.jobs import Job
from acttail.serve.tool_calls import CallReader
from acttail.sparse.rules import kind_of


class Wording:
    """Bodies of one response, of either kind.

    Args:
        model: name in the response.
        chat: whether it answers a conversation.
        tokenizer: of the model.
        tools: how the answers call tools; None where they cannot.
    """

    def __init__(
        self, model: str, *, chat: bool, tokenizer: Any, tools: "ToolWording | None" = None
    ) -> None:
        self.chat, self._tokenizer, self._tools = chat, tokenizer, tools
        # What reads a stream's calls, by choice.
        self._readers: dict[int, CallReader] = {}
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
            reader = None if self._tools is None else self._tools.reader()
            said = {"content": text} if reader is None else reader.whole(text)
            choice: dict[str, Any] = {"index": i, "finish_reason": self._finish(job, reader)}
            choice["logprobs"] = self._logprobs(pieces[i], job, offset=0)
            if self.chat:
                choice["message"] = {"role": "assistant", "refusal": None} | said
            else:
                choice["text"] = text
            choices.append(choice)
        return self._head | {"choices": choices, "usage": usage(jobs), "acttail": timings(jobs)}

    def first(self, index: int) -> dict[str, Any]:
        """The event that begins a choice of a conversation's stream."""
        forced = self._tools is not None and self._tools.forced
        return self._chunk(index, {"role": "assistant", "content": None if forced else ""})

    def chunks(self, index: int, piece: Piece, job: Job) -> list[dict[str, Any]]:
        """The events of a stream for a piece of a choice; none if it shows nothing yet."""
        deltas = self._deltas(index, piece.text)
        scored = job.logprobs is not None and piece.token >= 0
        if scored and not deltas:
            deltas = [{"content" if self.chat else "text": ""}]
        found = [self._chunk(index, delta) for delta in deltas]
        if scored:
            found[0]["choices"][0]["logprobs"] = self._logprobs([piece], job)
        return found

    def last(self, index: int, job: Job) -> list[dict[str, Any]]:
        """The events that end a choice of a stream."""
        found = [self._chunk(index, delta) for delta in self._deltas(index, "", last=True)]
        end = self._chunk(index, {})
        end["choices"][0]["finish_reason"] = self._finish(job, self._readers.get(index))
        return [*found, end | {"acttail": timings([job])}]

    def _deltas(self, index: int, text: str, *, last: bool = False) -> list[dict[str, Any]]:
        """What a choice says more by further text."""
        if self._tools is None:
            return [{"content" if self.chat else "text": text}] if text else []
        if index not in self._readers:
            self._readers[index] = self._tools.reader()
        return self._readers[index].push(text, last=last)

    def _finish(self, job: Job, reader: CallReader | None) -> str:
        """Why a generation ended."""
        # Where the request names the one function, OpenAI's API says stop though it is called.
        calls = (
            self._tools is not None
            and not self._tools.named
            and reader is not None
            and reader.calls
        )
        return "tool_calls" if calls and finish(job) == "stop" else finish(job)

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        """One event of a stream."""
        choice: dict[str, Any] = {"index": index, "finish_reason": None, "logprobs": None}
        choice |= {"delta": delta} if self.chat else {"text": ""} | delta
        body: dict[str, Any] = self._head | {"choices": [choice]}
        if self.chat:
            body["object"] = "chat.completion.chunk"
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


@dataclass(frozen=True)
class ToolWording:
    """How answers call tools.

    Attributes:
        form: of the calls in the text.
        forced: whether there is no text beside them.
        named: whether the request names the one function.
    """

    form: CallForm
    forced: bool
    named: bool

    def reader(self) -> CallReader:
        """What reads an answer."""
        return CallReader(self.form, self.forced)


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
