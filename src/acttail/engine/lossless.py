"""Lossless speculation: a plan's sparse decoding drafts, the dense model of the same weights has the last word.

A round drafts g tokens, by n-grams of the text so far or by the sparse engine, and verifies them in one dense
pass over g + 1 tokens, each of which gets bit for bit what it would get alone. So greedy text is dense decoding's,
token for token, and sampled text has its distribution (:mod:`acttail.engine.distribution`). The sparse engine
reads the dense keys and values of what is decided, and its own of its drafts; the pass overwrites those.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch

from acttail.engine.accounting import head_weights, projection_weights, read_share
from acttail.engine.base import Engine
from acttail.engine.distribution import Proposal
from acttail.engine.generation import Generation, Piece
from acttail.engine.native_engine import NativeEngine
from acttail.engine.ngrams import LENGTHS, Ngrams
from acttail.engine.protocol import Batch, Prompt, Sequence
from acttail.engine.sequence import NativeSequence
from acttail.engine.speculation import Drafts, Pace
from acttail.errors import ActTailError

_SPARSE = "sparse"
_NGRAMS = {n: f"{n}-grams" for n in LENGTHS}


class LosslessEngine(Engine):
    """The dense model, faster: drafts are its own weights under a plan, and n-grams of the text.

    Args:
        engine: native; with the plan that drafts, or dense for n-grams alone.
        pace: what is known of its speed; the engine's own by default.
        sparse: whether the plan drafts.
        ngrams: whether n-grams of the text draft.

    Attributes:
        dense: that decides.
        draft: that drafts, None if n-grams alone do.
        plan: None, for what comes out is dense.

    Raises:
        ActTailError: nothing would draft.
    """

    name = "native"
    together = NativeEngine.together
    counts_memory = NativeEngine.counts_memory
    one_plan = "every text is the dense model's, the plan only drafts"

    def __init__(
        self, engine: NativeEngine, *, pace: Pace | None = None, sparse: bool = True, ngrams: bool = True
    ) -> None:  # fmt: skip
        if not ngrams and (not sparse or engine.plan is None):
            raise ActTailError(
                "nothing would draft: give a plan or a sparsity, or let n-grams of the text draft"
            )
        self.dense = engine.dense
        self.draft = engine if sparse and engine.plan is not None else None
        self.pace, self.ngrams = pace or engine.pace, ngrams
        self.plan, self.dtype, self.context = None, engine.dtype, engine.context
        self.vocabulary, self.source, self.eos = engine.vocabulary, engine.source, engine.eos
        self.threads, self.tokenizer = engine.threads, engine.tokenizer

    def new_sequence(self, capacity: int | None = None) -> NativeSequence:
        """See :meth:`TokenEngine.new_sequence`."""
        return self.dense.new_sequence(capacity)

    @property
    def drafters(self) -> dict[str, Any]:
        """See :meth:`Engine.drafters`."""
        plan = self.draft.plan if self.draft is not None else None
        return {
            "sparsity": plan.sparsity if plan else None,
            "allocator": plan.allocator if plan else None,
            "ngrams": self.ngrams,
        }

    @property
    def keeps_prefixes(self) -> bool:
        """See :meth:`TokenEngine.keeps_prefixes`."""
        return self.dense.keeps_prefixes

    @property
    def kv_bytes(self) -> int:
        """See :meth:`TokenEngine.kv_bytes`; what drafts write is in the dense model's caches."""
        return self.dense.kv_bytes

    @property
    def replayed(self) -> int:
        """See :meth:`TokenEngine.replayed`."""
        return self.dense.replayed

    def prompt(self, sequence: Sequence, tokens: torch.Tensor) -> Prompt:
        """See :meth:`TokenEngine.prompt`."""
        return self.dense.prompt(sequence, tokens)

    def decodes(self, sequence: Sequence, tokens: int) -> bool:
        """See :meth:`TokenEngine.decodes`."""
        return self.dense.decodes(sequence, tokens)

    def _append(self, batch: Batch) -> torch.Tensor:
        return self.dense._append(batch)

    def read_share(self, sequence: Sequence) -> float:
        """Weights read for the last token over those of a dense one.

        Of a round the first token bears what all its drafts and the pass have read, the others nothing.
        """
        return self.dense.read_share(sequence)

    def start(self, generation: Generation, prompt: torch.Tensor, **arguments: Any) -> Sequence:
        """See :meth:`Engine.start`; from here on :attr:`Generation.drafts` counts."""
        generation.drafts = Drafts()
        return super().start(generation, prompt, **arguments)

    def rounds(self, generation: Generation, sequence: Sequence) -> "Speculation":
        """See :meth:`Engine.rounds`."""
        assert isinstance(sequence, NativeSequence)  # noqa: S101
        return Speculation(self, generation, sequence)

    def pieces(self, generation: Generation, sequence: Sequence) -> Iterator[Piece]:
        """See :meth:`Engine.pieces`."""
        speculation = self.rounds(generation, sequence)
        if not generation.tokens:
            yield generation.advance(self.step([(sequence, generation.next_tokens)])[0])
        while not generation.finished:
            yield from speculation.round()


class Speculation:
    """One generation under way.

    Args:
        engine: that runs it.
        generation: begun.
        sequence: of the dense engine; ends before the generation's next tokens.
    """

    def __init__(
        self, engine: LosslessEngine, generation: Generation, sequence: NativeSequence
    ) -> None:
        self._engine, self._generation, self._sequence = engine, generation, sequence
        self._pace = engine.pace
        self._logits = torch.empty(self._pace.most + 1, engine.vocabulary)
        self._drafted = torch.empty(engine.vocabulary)
        self._ngrams = Ngrams()
        if generation.drafts is None:
            generation.drafts = Drafts()
        self._stats = generation.drafts

    @property
    def _room(self) -> int:
        """Drafts that the text and the sequence have room for."""
        sequence = self._sequence
        return min(self._generation.remaining, sequence.capacity - sequence.length) - 1

    @property
    def width(self) -> int:
        """See :attr:`acttail.engine.base.Rounds.width`."""
        return min(self._room, self._pace.most) + 1

    def round(self) -> Iterator[Piece]:
        """Draft, verify, and give at least one token; the sequence is at each of them as in plain decoding."""
        generation, sequence, pace = self._generation, self._sequence, self._pace
        room = self._room
        started = time.perf_counter()
        token, start = int(generation.next_tokens[0]), sequence.length
        source, drafts, read = self._draft(token, room)
        tokens = [token, *(d.token for d in drafts)]
        began = time.perf_counter()
        sequence.run_together(tokens, self._logits)
        ended = time.perf_counter()
        pace.note_pass(len(tokens), ended - began)
        self._count(drafts)
        layout = self._engine.dense.packed.layout
        head = head_weights(layout)
        sequence.weights_read = head + round((1 + read) * projection_weights(layout))
        kept = 0
        for i in range(len(tokens)):
            proposal = drafts[i] if i < len(drafts) else None
            # As if token i had been the last to be fed: whoever stops here finds a whole sequence.
            sequence.set_length(start + i + 1)
            piece = generation.advance(self._logits[i], proposal)
            good = proposal is not None and piece.token == proposal.token
            if proposal is not None:
                pace.note_outcome(source, proposal.confidence, good)
            kept += good
            self._stats.accepted += good
            last = not good or generation.finished
            if last:
                self._close(source, kept, ended - started)
            yield piece
            if last:
                return
            sequence.weights_read = head

    def _count(self, drafts: list[Proposal]) -> None:
        self._stats.drafted += len(drafts)
        if drafts:
            self._stats.rounds += 1
        else:
            self._stats.plain += 1

    def _close(self, source: str, kept: int, seconds: float) -> None:
        """Note what a round has brought."""
        if not source:
            self._pace.note_plain()
            return
        self._pace.note_round(source, kept + 1, seconds)
        self._stats.gain = self._pace.gain(source)

    def _draft(self, token: int, room: int) -> tuple[str, list[Proposal], float]:
        """(who drafted or "", drafts worth verifying, share of a dense token's weights read for them)."""
        engine, pace = self._engine, self._pace
        run, tokens = self._lookup(room) if engine.ngrams else (0, [])
        if tokens:
            source, confidence = _NGRAMS[run], (run - LENGTHS[-1] + 1) / (len(LENGTHS) + 1)
            sure = [confidence] * len(tokens)
            other = pace.worth_drafting(_SPARSE, room) if engine.draft is not None else 0.0
            n = pace.keep(source, sure, room)
            if n and (pace.trying(source) or pace.worth(source, sure, room) >= other):
                return source, [Proposal(t, None, confidence) for t in tokens[:n]], 0.0
        if engine.draft is None or not pace.wants(_SPARSE, [], room):
            return "", [], 0.0
        return (_SPARSE, *self._draft_sparse(engine.draft, token, room))

    def _lookup(self, room: int) -> tuple[int, list[int]]:
        """What the text so far says comes next, as :meth:`Ngrams.lookup` gives it."""
        generation, ngrams = self._generation, self._ngrams
        if not len(ngrams):
            ngrams.extend(generation.prompt.tolist())
        ngrams.extend(generation.tokens[len(ngrams) - generation.prompt_tokens :])
        return ngrams.lookup(min(room, self._pace.most))

    def _draft_sparse(
        self, engine: NativeEngine, token: int, room: int
    ) -> tuple[list[Proposal], float]:
        """Drafts of the sparse engine; the sequence is afterwards as it was."""
        sequence, pace, layout = self._sequence, self._pace, engine.packed.layout
        start, read = sequence.length, 0.0
        found: list[Proposal] = []
        sure: list[float] = []
        try:
            while pace.wants(_SPARSE, sure, room):
                began = time.perf_counter()
                with engine.decoder.lock:
                    weights = engine.decoder.forward(
                        sequence.cache, torch.tensor([token]), self._drafted
                    )
                found.append(self.propose(self._drafted))
                pace.note_draft(_SPARSE, time.perf_counter() - began)
                sure.append(found[-1].confidence)
                read += read_share(layout, weights)
                token = found[-1].token
        finally:
            # Also where it fails: who goes on from this sequence later must find nothing sparse in it.
            sequence.set_length(start)
        return found[: pace.keep(_SPARSE, sure, room)], read

    def propose(self, logits: torch.Tensor) -> Proposal:
        """A draft from the sparse engine's logits [vocabulary]."""
        return self._generation.propose(logits)


def lossless(engine: Engine, *, sparse: bool, ngrams: bool) -> LosslessEngine:
    """See :meth:`Engine.lossless`."""
    if not isinstance(engine, NativeEngine):
        why = f": {engine.reason}" if engine.reason else ""
        raise ActTailError(f"lossless decoding needs the native engine, not {engine.name}{why}")
    return LosslessEngine(engine, sparse=sparse, ngrams=ngrams)
