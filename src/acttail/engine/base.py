"""The engine as users meet it: text or token ids in, text out, whatever runs below."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar, Protocol

import torch

from acttail.engine import text
from acttail.engine.config import EngineConfig
from acttail.engine.generation import Constraint, Generation, Piece
from acttail.engine.protocol import Sequence as EngineSequence
from acttail.engine.protocol import TokenEngine
from acttail.engine.sampling import Sampling
from acttail.errors import ActTailError
from acttail.model.opened import Opened
from acttail.plan import SparsityPlan
from acttail.sparse.policy import PrefillPolicy


class Rounds(Protocol):
    """A generation that goes on by several tokens at a time."""

    @property
    def width(self) -> int:
        """Positions of the sequence that the next round may take, for a while, from its end on."""
        ...

    def round(self) -> Iterator[Piece]:
        """The next tokens, at least one.

        At every piece the sequence holds all tokens but the last one; whoever stops there may.
        """
        ...


class Engine(TokenEngine):
    """Generates text. Made by :meth:`from_model` or :meth:`from_pretrained`.

    Attributes:
        tokenizer: of the model, None if it was not given.
        one_plan: why it keeps the plan it has, None if its weights take another at any time.
    """

    tokenizer: Any
    one_plan: str | None = "this engine keeps one plan; use the native one"
    # Set by the package to acttail.engine.open, which knows every engine; they know this class, and it
    # knows none of them.
    _open_model: ClassVar[Callable[..., "Engine"]]
    _open_pretrained: ClassVar[Callable[..., "Engine"]]
    _make_lossless: ClassVar[Callable[..., "Engine"]]

    @staticmethod
    def from_model(
        model: Any, plan: SparsityPlan | None = None, *, dtype: str | None = None, tokenizer: Any = None,
        threads: int | None = None, prefill: str | PrefillPolicy | None = None, kv_dtype: str | None = None,
        head_dtype: str | None = None, group: int | None = None, native: bool | None = None,
        progress: Any = None,
    ) -> "Engine":  # fmt: skip
        """Make an engine of a loaded transformers model.

        Args:
            model: causal LM; may be deleted afterwards if the engine is native.
            plan: which inputs each projection keeps; None for the plan of a model that is sparse
                already, else dense.
            dtype: of the engine's weights: ``fp32``, ``bf16`` (the default), ``int8``, ``int4``. Like the
                other formats it may be given in torch's spelling, and it is never dropped: where
                transformers must run and has no such thing, that is an error.
            tokenizer: of the model; without one only token ids can be generated.
            threads: that decode; torch's number by default.
            prefill: which tokens of a prompt are sparse; None for the policy that a sparse model or an
                .acttail folder carries, else ``all``.
            kv_dtype: of the KV cache: ``fp32``, ``bf16`` or ``int8``; fp32 for fp32 weights, else bf16.
            head_dtype: of embedding and output head; fp32 for fp32 weights, else int8.
            group: inputs that share a scale in int8 and int4; None for the default.
            native: True insists on the native engine, False on transformers; None takes transformers
                where the native one does not reach, with a warning that says why.
            progress: called with (matrices done, matrices).

        Raises:
            UnsupportedModelError: `native` is True and the engine does not run this model or the plan's
                rule.
            PlanError: the plan was made for another model.
            ActTailError: an unknown format, or transformers must run the model and cannot do what was
                asked for.
        """
        config = EngineConfig(dtype, head_dtype, kv_dtype, group, threads, prefill)
        return Engine._open_model(
            model, plan, config, tokenizer=tokenizer, native=native, progress=progress
        )

    @staticmethod
    def from_pretrained(
        model: str | PathLike[str] | Opened, plan: SparsityPlan | str | None = None, *,
        dtype: str | None = None, threads: int | None = None,
        prefill: str | PrefillPolicy | None = None, kv_dtype: str | None = None,
        head_dtype: str | None = None, group: int | None = None, native: bool | None = None,
        progress: Any = None,
    ) -> "Engine":  # fmt: skip
        """Make an engine of a model on disk or on the Hub, or of an .acttail folder.

        Weights are read one matrix at a time; a GGUF's own Q8_0, Q4_0 and Q4_1 blocks are taken as they
        are when their width is the one asked for. Arguments as in :meth:`from_model`; an .acttail folder
        has its dtypes, and its plan unless another is given. What is opened already
        (:func:`acttail.model.opened.open_model`) is not read again.

        Raises:
            ModelError: no such model.
            UnsupportedModelError: `native` is True and the engine does not run this model or the plan's
                rule.
            PlanError: the plan was made for another model.
            ActTailError: an unknown format, or transformers must run the model and cannot do what was
                asked for.
        """
        config = EngineConfig(dtype, head_dtype, kv_dtype, group, threads, prefill)
        return Engine._open_pretrained(model, plan, config, native=native, progress=progress)

    def encode(self, prompt: str, *, chat: bool = False) -> torch.Tensor:
        """Token ids [n] of a prompt.

        Args:
            prompt: the text.
            chat: wrap it as the user's message in the tokenizer's chat template.

        Raises:
            ActTailError: there is no tokenizer or no chat template, or the prompt is empty.
        """
        if chat:
            return self.encode_chat([{"role": "user", "content": prompt}])
        return text.encode(self.tokenizer, prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> torch.Tensor:
        """Token ids [n] of a conversation, ready for the assistant's answer.

        Args:
            messages: with ``role`` and ``content``, as the tokenizer's chat template takes them.

        Raises:
            ActTailError: there is no tokenizer or no chat template, or the template refuses the
                messages.
        """
        return text.encode_chat(self.tokenizer, messages)

    def stream(
        self, prompt: str | torch.Tensor, result: Generation | None = None, *, max_new_tokens: int = 128,
        sampling: Sampling | None = None, stop: Sequence[str] = (), chat: bool = False,
        logprobs: int | None = None, cancelled: Callable[[], bool] | None = None,
        sequence: EngineSequence | None = None, held: int = 0, lossless: bool = False,
    ) -> Iterator[Piece]:  # fmt: skip
        """Generate piece by piece; closing the iterator stops at once.

        Args:
            prompt: text, or token ids [n].
            result: filled as the generation goes.
            max_new_tokens: tokens at most.
            sampling: greedy by default.
            stop: strings that end the text.
            chat: wrap a text prompt in the chat template.
            logprobs: report the log-probabilities of so many likeliest tokens.
            cancelled: asked before every token.
            sequence: go on from this one; a new one by default.
            held: tokens of the prompt that this sequence already ends with.
            lossless: generate what the dense model would, with this engine to draft (:meth:`lossless`).

        Raises:
            ActTailError: the prompt is empty or longer than the context, or `lossless` and the engine is not the
                native one.
        """
        if lossless:
            yield from self.lossless().stream(
                prompt, result, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, chat=chat,
                logprobs=logprobs, cancelled=cancelled, sequence=sequence, held=held,
            )  # fmt: skip
            return
        ids = self.encode(prompt, chat=chat) if isinstance(prompt, str) else prompt
        generation = Generation() if result is None else result
        sequence = self.start(
            generation, ids, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, logprobs=logprobs,
            sequence=sequence, held=held,
        )  # fmt: skip
        pieces = self.pieces(generation, sequence)
        while not generation.finished:
            if cancelled is not None and cancelled():
                rest = generation.cancel()
                if rest is not None:
                    yield rest
                return
            yield next(pieces)

    def pieces(self, generation: Generation, sequence: EngineSequence) -> Iterator[Piece]:
        """What :meth:`start` has begun, token by token to its end.

        Args:
            generation: begun.
            sequence: that it was begun with. At every piece it holds all tokens but the last one.
        """
        while not generation.finished:
            yield generation.advance(self.step([(sequence, generation.next_tokens)])[0])

    def rounds(self, generation: Generation, sequence: EngineSequence) -> Rounds | None:
        """What carries a generation on by several tokens at a time; None where tokens come one by one.

        Args:
            generation: begun, its first token drawn.
            sequence: that it was begun with.
        """
        return None

    @property
    def drafters(self) -> dict[str, Any] | None:
        """Who drafts for a lossless engine, as plain JSON data; None for any other.

        ``sparsity`` and ``allocator`` of the plan that drafts, None without one; whether ``ngrams`` do.
        """
        return None

    def lossless(self, *, sparse: bool = True, ngrams: bool = True) -> "Engine":
        """The engine that generates what the dense model would, this one drafting for it.

        Greedy text is dense decoding's token for token, sampled text has its distribution. Where drafts are not
        seen to pay, tokens are decoded plainly; :attr:`Generation.drafts` tells.

        Args:
            sparse: let the same weights draft under this engine's plan, if it has one.
            ngrams: let n-grams of the prompt and the text so far draft.

        Raises:
            ActTailError: this is not the native engine, or nothing would draft.
        """
        return Engine._make_lossless(self, sparse=sparse, ngrams=ngrams)

    def start(
        self, generation: Generation, prompt: torch.Tensor, *, max_new_tokens: int = 128,
        sampling: Sampling | None = None, stop: Sequence[str] = (), logprobs: int | None = None,
        sequence: EngineSequence | None = None, held: int = 0, constraint: Constraint | None = None,
    ) -> EngineSequence:  # fmt: skip
        """Begin a generation of this engine's model; :meth:`step` and ``advance`` by turns carry it on.

        Args:
            generation: a new one.
            prompt: [n] token ids.
            max_new_tokens: tokens at most.
            sampling: greedy by default.
            stop: strings that end the text.
            logprobs: report the log-probabilities of so many likeliest tokens.
            sequence: go on from this one; a new one by default.
            held: tokens of the prompt that this sequence already ends with.
            constraint: what the text is held to.

        Returns:
            The sequence to feed its tokens to.

        Raises:
            ActTailError: the prompt is empty, or longer than the context or the sequence.
        """
        if len(prompt) >= self.context:
            raise ActTailError(
                f"the prompt has {len(prompt)} tokens, the model's context is {self.context}"
            )
        if sequence is None:
            sequence = self.new_sequence(min(self.context, len(prompt) + max_new_tokens))
        # The last token is drawn and not fed.
        room = sequence.capacity - sequence.length - (len(prompt) - held) + 1
        if room < 1:
            sequence.check(prompt[held:])
        generation.begin(
            prompt, max_new_tokens=min(max_new_tokens, room), sampling=sampling or Sampling(),
            tokenizer=self.tokenizer, stop=stop, eos=self.eos, logprobs=logprobs, held=held,
            constraint=constraint,
        )  # fmt: skip
        return sequence

    def generate(self, prompt: str | torch.Tensor, **arguments: Any) -> Generation:
        """Generate to the end; arguments as in :meth:`stream`."""
        result = Generation()
        for _ in self.stream(prompt, result, **arguments):
            pass
        return result
