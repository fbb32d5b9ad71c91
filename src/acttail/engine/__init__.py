"""Decoding engines: native kernels where they reach, transformers everywhere else."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from acttail.engine.generation import Generation, Piece, stream
from acttail.engine.sampling import Sampling
from acttail.engine.sequence import NativeSequence, TransformersSequence
from acttail.engine.spec import UnsupportedModelError, describe
from acttail.errors import ActTailError, ActTailWarning
from acttail.plan import SparsityPlan
from acttail.prefill import PrefillPolicy

__all__ = [
    "Engine",
    "Generation",
    "NativeEngine",
    "Piece",
    "Sampling",
    "TransformersEngine",
    "UnsupportedModelError",
]

_TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Engine:
    """Generates text. Made by :meth:`from_model` or :meth:`from_pretrained`.

    Attributes:
        name: ``native`` or ``transformers``: what runs.
        reason: why it is not the native one, None if it is.
        tokenizer: of the model, None if it was not given.
        plan: in use, None for dense.
        dtype: of the weights.
        context: longest sequence, in tokens.
    """

    name: str
    reason: str | None = None
    tokenizer: Any
    plan: SparsityPlan | None
    dtype: str
    context: int
    source: str
    _eos: frozenset[int]

    @staticmethod
    def from_model(
        model: Any, plan: SparsityPlan | None = None, *, dtype: str = "bf16", tokenizer: Any = None,
        threads: int | None = None, prefill: str | PrefillPolicy = "all", kv_dtype: str | None = None,
        head_dtype: str | None = None, group: int | None = None, native: bool | None = None,
        progress: Any = None,
    ) -> "Engine":  # fmt: skip
        """Make an engine of a loaded transformers model.

        Args:
            model: causal LM; may be deleted afterwards if the engine is native.
            plan: which inputs each projection keeps; None for the plan of a model that is sparse
                already, else dense.
            dtype: of the engine's weights: ``fp32``, ``bf16``, ``int8``, ``int4``.
            tokenizer: of the model; without one only token ids can be generated.
            threads: that decode; torch's number by default.
            prefill: which tokens of a prompt are sparse.
            kv_dtype: of the KV cache: ``fp32``, ``bf16`` or ``int8``; fp32 for fp32 weights, else bf16.
            head_dtype: of embedding and output head; fp32 for fp32 weights, else int8.
            group: inputs that share a scale in int8 and int4; None for the default.
            native: True insists on the native engine, False on transformers; None takes transformers
                where the native one does not reach, with a warning that says why.
            progress: called with (matrices done, matrices).

        Raises:
            UnsupportedModelError: `native` is True and the engine does not run this model.
            PlanError: the plan was made for another model.
        """
        from acttail.checkpoint import LoadedWeights
        from acttail.sparsify import sparse_state

        weights = LoadedWeights(model)
        state = sparse_state(model)
        if plan is None and state is not None:
            plan, prefill = state.plan, state.policy
        if plan is not None:
            plan.check(weights)
        if native is not False:
            try:
                return _native(
                    describe(model), weights, plan, dtype, tokenizer, threads, prefill, kv_dtype,
                    head_dtype, group, model.generation_config, progress,
                )  # fmt: skip
            except (UnsupportedModelError, _NotAvailableError) as error:
                if native:
                    raise
                reason = str(error)
                warnings.warn(
                    f"{reason}; transformers runs it instead", ActTailWarning, stacklevel=2
                )
        else:
            reason = "transformers was asked for"
        return TransformersEngine(model, plan, tokenizer, prefill, reason)

    @staticmethod
    def from_pretrained(
        model: str | os.PathLike[str], plan: SparsityPlan | str | None = None, *, dtype: str = "bf16",
        threads: int | None = None, prefill: str | PrefillPolicy = "all", kv_dtype: str | None = None,
        head_dtype: str | None = None, group: int | None = None, native: bool | None = None,
        progress: Any = None,
    ) -> "Engine":  # fmt: skip
        """Make an engine of a model on disk or on the Hub, or of an .acttail folder.

        Weights are read one matrix at a time; a GGUF's own Q8_0, Q4_0 and Q4_1 blocks are taken as they
        are when their width is the one asked for. Arguments as in :meth:`from_model`; an .acttail folder
        has its dtype, and its plan unless another is given.

        Raises:
            ModelError: no such model.
            UnsupportedModelError: `native` is True and the engine does not run this model.
            PlanError: the plan was made for another model.
        """
        from acttail.engine.store import is_folder

        loaded = SparsityPlan.load(plan) if isinstance(plan, str) else plan
        path = Path(model)
        if is_folder(path):
            return _from_folder(path, loaded, threads, prefill, kv_dtype)
        if native is not False:
            try:
                return _from_source(
                    model, loaded, dtype, threads, prefill, kv_dtype, head_dtype, group, progress
                )
            except (UnsupportedModelError, _NotAvailableError):
                if native:
                    raise
        from acttail.models import load

        kept = _TORCH_DTYPES.get(dtype, "bfloat16")
        lm, tokenizer = load(model, dtype=kept)
        return Engine.from_model(
            lm,
            loaded,
            dtype=dtype,
            tokenizer=tokenizer,
            threads=threads,
            prefill=prefill,
            native=native,
        )

    def new_sequence(self, capacity: int | None = None) -> Any:
        """An empty sequence, independent of all others.

        Args:
            capacity: tokens it may hold; the model's context (at most 8,192) by default.
        """
        raise NotImplementedError

    def read_share(self, sequence: Any) -> float:
        """Share of the projections' weights that the last token decoded in a sequence read.

        Args:
            sequence: of this engine.
        """
        return 1.0 if self.plan is None else 1.0 - self.plan.realised_sparsity

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
        ids = self._need_tokenizer()(prompt)["input_ids"]
        if not ids:
            raise ActTailError("the prompt is empty")
        return torch.tensor(ids, dtype=torch.int64)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> torch.Tensor:
        """Token ids [n] of a conversation, ready for the assistant's answer.

        Args:
            messages: with ``role`` and ``content``, as the tokenizer's chat template takes them.

        Raises:
            ActTailError: there is no tokenizer or no chat template, or the template refuses the
                messages.
        """
        tokenizer = self._need_tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise ActTailError("this model has no chat template")
        try:
            ids = tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        except TemplateError as error:
            raise ActTailError(f"the chat template refuses the messages: {error}") from error
        if not ids:
            raise ActTailError("the prompt is empty")
        return torch.tensor(ids, dtype=torch.int64)

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ActTailError("this engine has no tokenizer: give token ids")
        return self.tokenizer

    def stream(
        self, prompt: str | torch.Tensor, result: Generation | None = None, *, max_new_tokens: int = 128,
        sampling: Sampling | None = None, stop: Sequence[str] = (), chat: bool = False,
        logprobs: int | None = None, cancelled: Callable[[], bool] | None = None, sequence: Any = None,
        held: int = 0,
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

        Raises:
            ActTailError: the prompt is empty or longer than the context.
        """
        ids = self.encode(prompt, chat=chat) if isinstance(prompt, str) else prompt
        if len(ids) >= self.context:
            raise ActTailError(
                f"the prompt has {len(ids)} tokens, the model's context is {self.context}"
            )
        if sequence is None:
            sequence = self.new_sequence(min(self.context, len(ids) + max_new_tokens))
        room = sequence.capacity - sequence.length - (len(ids) - held)
        yield from stream(
            sequence, self.tokenizer, ids, Generation() if result is None else result,
            max_new_tokens=min(max_new_tokens, room + 1), sampling=sampling or Sampling(), stop=stop,
            eos=self._eos, logprobs=logprobs, cancelled=cancelled, held=held,
        )  # fmt: skip

    def generate(self, prompt: str | torch.Tensor, **arguments: Any) -> Generation:
        """Generate to the end; arguments as in :meth:`stream`."""
        result = Generation()
        for _ in self.stream(prompt, result, **arguments):
            pass
        return result


class NativeEngine(Engine):
    """The engine of native kernels: a whole token in one call."""

    name = "native"

    def __init__(
        self, packed: Any, plan: SparsityPlan | None, tokenizer: Any, threads: int | None,
        prefill: str | PrefillPolicy, kv_dtype: str | None, eos: frozenset[int],
    ) -> None:  # fmt: skip
        from acttail.engine.native import KV_FORMATS, NativeDecoder
        from acttail.engine.prefill import Prefill
        from acttail.engine.tune import dense_kernels

        kv = kv_dtype or ("fp32" if packed.layout.dtype == "fp32" else "bf16")
        if kv not in KV_FORMATS:
            raise ActTailError(f"unknown KV cache dtype {kv!r}: use {', '.join(KV_FORMATS)}")
        self._kv = kv
        self.policy = PrefillPolicy.parse(prefill)
        self.packed, self.plan, self.tokenizer, self._eos = packed, plan, tokenizer, eos
        self.dtype, self.context = packed.layout.dtype, packed.layout.spec.context
        self.source = packed.layout.source
        self.threads = threads or torch.get_num_threads()
        self.decoder = NativeDecoder(
            packed, plan, self.threads, kv, dense_kernels(packed.layout, plan)
        )
        self._prefill = Prefill(self.decoder)

    def new_sequence(self, capacity: int | None = None) -> NativeSequence:
        """See :meth:`Engine.new_sequence`."""
        size = min(self.context, 8192) if capacity is None else capacity
        return NativeSequence(self.decoder, self._prefill, self.policy, size)

    def read_share(self, sequence: NativeSequence) -> float:
        """See :meth:`Engine.read_share`; counted by the kernels."""
        layout = self.packed.layout
        head = layout.spec.vocabulary * layout.spec.hidden
        held = sum(
            layout.shapes[name].rows * sum(s.d_out for s in segments)
            for name, segments in layout.segments.items()
        )
        return float(max(0, sequence.weights_read - head) / held)

    def with_plan(self, plan: SparsityPlan | None) -> "NativeEngine":
        """The same weights in memory under another plan; costs milliseconds.

        Args:
            plan: made for this model; None for dense.

        Raises:
            PlanError: the plan was made for another model.
        """
        return NativeEngine(
            self.packed, plan, self.tokenizer, self.threads, self.policy, self._kv, self._eos
        )


class TransformersEngine(Engine):
    """transformers' own forward pass, for what the native engine does not run."""

    name = "transformers"

    def __init__(
        self, model: Any, plan: SparsityPlan | None, tokenizer: Any, prefill: str | PrefillPolicy,
        reason: str | None,
    ) -> None:  # fmt: skip
        from acttail.checkpoint import LoadedWeights
        from acttail.sparsify import densify_, sparsify_

        self.model, self.plan, self.tokenizer, self.reason = model, plan, tokenizer, reason
        if plan is not None:
            sparsify_(model, plan, prefill=prefill)
        else:
            densify_(model)
        self.dtype = str(model.dtype).removeprefix("torch.")
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context = int(limit or 8192)
        self.source = LoadedWeights(model).name
        self._eos = eos_of(model.generation_config, tokenizer)

    def new_sequence(self, capacity: int | None = None) -> TransformersSequence:
        """See :meth:`Engine.new_sequence`."""
        return TransformersSequence(self.model, capacity or self.context)


class _NotAvailableError(ActTailError):
    """There is no native library here."""


def eos_of(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a sequence."""
    found = getattr(generation_config, "eos_token_id", None)
    ids = found if isinstance(found, list) else [found]
    ids = [*ids, getattr(tokenizer, "eos_token_id", None)]
    return frozenset(int(i) for i in ids if isinstance(i, int))


def _require_library() -> None:
    from acttail.engine.native import library

    try:
        library()
    except ActTailError as error:
        raise _NotAvailableError(str(error)) from error


def _native(
    spec: Any, weights: Any, plan: SparsityPlan | None, dtype: str, tokenizer: Any, threads: int | None,
    prefill: str | PrefillPolicy, kv_dtype: str | None, head_dtype: str | None, group: int | None,
    generation_config: Any, progress: Any,
) -> NativeEngine:  # fmt: skip
    from acttail.engine.convert import Conversion, convert_in_memory

    _require_library()
    conversion = Conversion(spec, weights, dtype, plan=plan, head_dtype=head_dtype, group=group)
    packed = convert_in_memory(conversion, progress)
    eos = eos_of(generation_config, tokenizer)
    return NativeEngine(packed, plan, tokenizer, threads, prefill, kv_dtype, eos)


def _from_source(
    model: str | os.PathLike[str], plan: SparsityPlan | None, dtype: str, threads: int | None,
    prefill: str | PrefillPolicy, kv_dtype: str | None, head_dtype: str | None, group: int | None,
    progress: Any,
) -> NativeEngine:  # fmt: skip
    from acttail.engine.source import open_for_engine

    _require_library()
    opened = open_for_engine(model, own_blocks=dtype in ("int8", "int4"))
    if plan is None and opened.plan is not None:
        # A checkpoint saved sparse stays so, and keeps its policy unless another was asked for.
        plan, prefill = opened.plan, opened.prefill if str(prefill) == "all" else prefill
    if plan is not None:
        plan.check(opened.weights)
    return _native(
        opened.spec, opened.weights, plan, dtype, opened.tokenizer(), threads, prefill, kv_dtype, head_dtype,
        group, opened.generation_config, progress,
    )  # fmt: skip


def _from_folder(
    folder: Path, plan: SparsityPlan | None, threads: int | None, prefill: str | PrefillPolicy,
    kv_dtype: str | None,
) -> NativeEngine:  # fmt: skip
    from acttail.engine.source import folder_tokenizer
    from acttail.engine.store import read_folder

    _require_library()
    packed = read_folder(folder)
    tokenizer, eos = folder_tokenizer(folder)
    return NativeEngine(packed, plan or packed.plan, tokenizer, threads, prefill, kv_dtype, eos)
