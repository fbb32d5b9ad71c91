"""A conversation with a model: what was said, and the KV cache it left. Knows no terminal."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import torch

from acttail.calibrate.curves import SensitivityCurves
from acttail.chat.transcript import Message, check_messages
from acttail.engine.base import Engine
from acttail.engine.generation import Finish, Generation
from acttail.engine.protocol import Sequence as EngineSequence
from acttail.engine.protocol import common_length
from acttail.engine.sampling import Sampling
from acttail.engine.speculation import Drafts
from acttail.engine.variants import Variants
from acttail.errors import ActTailError

# Positions of a KV cache at least; it has twice what a turn may take, for a conversation grows and would outgrow
# it every time.
_LEAST = 1024


@dataclass(frozen=True)
class Turn:
    """How one answer went.

    Attributes:
        sparsity: it was given at.
        prompt_tokens: tokens of the conversation before it.
        held: of them, tokens that the KV cache held already.
        tokens: of the answer.
        prefill_seconds: until its first token.
        decode_seconds: from there to its end.
        read_share: mean share of the projections' weights that a decoded token read, NaN if none was.
        finish: why it ended.
        drafts: what became of its drafts, None if it was not speculative.
    """

    sparsity: float
    prompt_tokens: int
    held: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float
    read_share: float
    finish: Finish
    drafts: Drafts | None = None

    @property
    def decoded(self) -> int:
        """Tokens that were decoded: the first one belongs to the prefill."""
        return max(0, self.tokens - 1)


@dataclass(frozen=True)
class _Cache:
    """A sequence between turns, the engine it belongs to, and the tokens [n] it was fed."""

    engine: Engine
    sequence: EngineSequence
    tokens: torch.Tensor


class Conversation:
    """Messages to and from one model.

    The KV cache stays between turns, so that only new tokens are computed; where the chat template writes
    an earlier turn differently than it was said, from there on.

    Args:
        engine: with a tokenizer that has a chat template.
        curves: sensitivity curves of the model, to change the sparsity by.
        sampling: how answers are drawn; a seed is counted up from turn to turn.
        max_new_tokens: tokens of an answer at most.
        speaker: makes the engine that answers of one at the sparsity asked for; by default that is the one.

    Attributes:
        engine: that gives the next answer.
        plan: at whose sparsity it is given, or drafted; None for dense.
        messages: with ``role`` and ``content``, the system message first if there is one.
        turns: of the answers given here.

    Raises:
        ActTailError: there is no tokenizer or no chat template.
    """

    def __init__(
        self, engine: Engine, *, curves: SensitivityCurves | None = None,
        sampling: Sampling | None = None, max_new_tokens: int = 2048,
        speaker: Callable[[Engine], Engine] | None = None,
    ) -> None:  # fmt: skip
        if not getattr(engine.tokenizer, "chat_template", None):
            raise ActTailError(
                f"{engine.source} has no chat template: it is no chat model; "
                "`acttail generate` continues a text with it"
            )
        self._variants = Variants(engine, curves, uniform=True)
        self._sampling, self._limit = sampling or Sampling(), max_new_tokens
        self._speaker = speaker or (lambda engine: engine)
        self.engine, self.plan = self._speaker(engine), engine.plan
        self.messages: list[Message] = []
        self.turns: list[Turn] = []
        self._cache: _Cache | None = None
        self._answer: Generation | None = None  # under way
        self._stopping = False

    @property
    def sparsity(self) -> float:
        """Model sparsity of the next answer."""
        return 0.0 if self.plan is None else float(self.plan.sparsity)

    @property
    def fixed(self) -> str | None:
        """Why the sparsity cannot be changed, None if it can."""
        return self._variants.fixed

    def at(self, sparsity: float) -> None:
        """Answer at another sparsity from now on; the weights stay, the KV cache is made anew.

        Raises:
            ActTailError: the sparsity cannot be changed, or is out of reach.
        """
        engine = self._variants.at(sparsity)
        self.engine, self.plan = self._speaker(engine), engine.plan

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first is not None and first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages if self.system is None else self.messages[1:]
        self.messages = [{"role": "system", "content": text}, *rest] if text else list(rest)

    def clear(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages = self.messages[:1] if self.system is not None else []

    def resume(self, messages: Sequence[Message]) -> None:
        """Go on from these messages instead.

        Raises:
            ActTailError: they are no conversation.
        """
        self.messages = check_messages(messages)

    @property
    def tokens_held(self) -> int:
        """Tokens of the conversation that the KV cache holds."""
        return 0 if self._cache is None else len(self._cache.tokens)

    def stop(self) -> bool:
        """End the answer under way at its next token; what was said is kept. For a signal handler.

        Returns:
            False if nothing was said yet, or it is to stop already.
        """
        if self._stopping or self._answer is None or not self._answer.tokens:
            return False
        self._stopping = True
        return True

    def ask(self, text: str) -> Generator[str, None, None]:
        """Say something and get the answer piece by piece.

        Both become messages once the answer ends, however it ends; if nothing of it was said, neither
        does. Closing the iterator ends it.

        Args:
            text: the user's message.

        Raises:
            ActTailError: the chat template refuses the messages, or they are longer than the context.
        """
        engine, seed = self.engine, self._sampling.seed
        said = [*self.messages, {"role": "user", "content": text}]
        ids = engine.encode_chat(said)
        if len(ids) >= engine.context:
            raise ActTailError(
                f"the conversation has {len(ids)} tokens, the model's context {engine.context}: clear it"
            )
        sampling = replace(
            self._sampling, seed=None if seed is None else (seed + len(self.turns)) % 2**63
        )
        sequence, held = self._room(engine, ids)
        whole, self._stopping = False, False
        generation = self._answer = Generation()
        shares: list[float] = []
        pieces = engine.stream(
            ids, generation, max_new_tokens=self._limit, sampling=sampling, sequence=sequence, held=held,
            cancelled=lambda: self._stopping,
        )  # fmt: skip
        try:
            for piece in pieces:
                if piece.token >= 0 and len(generation.tokens) > 1:
                    shares.append(engine.read_share(sequence))
                if piece.text:
                    yield piece.text
            whole = True
        except GeneratorExit:
            generation.cancel()
            whole = True
            raise
        finally:
            self._answer = None
            if generation.tokens:
                answer: Message = {"role": "assistant", "content": generation.text}
                self.messages = [*said, answer]
                share = sum(shares) / len(shares) if shares else float("nan")
                self.turns.append(
                    Turn(
                        self.sparsity, len(ids), held, len(generation.tokens), generation.prefill_seconds,
                        generation.decode_seconds, share, generation.finish if whole else "cancelled",
                        generation.drafts,
                    )
                )  # fmt: skip
            # An interrupted pass leaves a cache of which nobody knows what it holds.
            if whole and engine.keeps_prefixes:
                fed = torch.cat([ids, torch.tensor(generation.tokens, dtype=torch.int64)])
                self._cache = _Cache(engine, sequence, fed[: sequence.length])

    def _room(self, engine: Engine, ids: torch.Tensor) -> tuple[EngineSequence, int]:
        """A sequence for a prompt and its answer, and how many of the prompt's tokens it holds.

        Until the answer has ended, nothing is held.
        """
        cache, self._cache = self._cache, None
        needed = min(engine.context, len(ids) + self._limit)
        if cache is not None and cache.engine is engine and cache.sequence.capacity >= needed:
            held = min(common_length(cache.tokens, ids), len(ids) - 1)
            cache.sequence.truncate(held)
            return cache.sequence, held
        del cache  # its memory, before there is another
        return engine.new_sequence(min(engine.context, max(_LEAST, 2 * needed))), 0
