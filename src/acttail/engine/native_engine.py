"""The engine of native kernels: a whole token in one call."""

from dataclasses import replace
from typing import Any

import torch

from acttail.engine.accounting import shares_of
from acttail.engine.base import Engine
from acttail.engine.config import EngineConfig
from acttail.engine.known import Check
from acttail.engine.native import KvPool, NativeDecoder
from acttail.engine.prefill import Prefill
from acttail.engine.protocol import Batch, Prompt, Sequence
from acttail.engine.sequence import NativePrompt, NativeSequence, decode
from acttail.engine.speculation import Pace
from acttail.engine.store import Packed
from acttail.engine.tune import dense_kernels, read_together
from acttail.plan import SparsityPlan
from acttail.sparse.backends import abi
from acttail.sparse.policy import PrefillPolicy


class NativeEngine(Engine):
    """Packed weights in the hands of the native kernels.

    Attributes:
        packed: the weights.
        config: what was asked for.
        policy: which tokens of a prompt are sparse.
        threads: that decode.
        decoder: that runs them.
        pace: what is known of speculation under this plan.
    """

    name = "native"
    together = abi.MOST_TOGETHER
    counts_memory = True
    one_plan = None

    def __init__(
        self, packed: Packed, plan: SparsityPlan | None, config: EngineConfig, *, tokenizer: Any = None,
        eos: frozenset[int] = frozenset(), check: Check | None = None, pool: KvPool | None = None,
    ) -> None:  # fmt: skip
        self.config, self.policy = config, config.policy(packed.policy)
        self.packed, self.plan, self.tokenizer, self.eos = packed, plan, tokenizer, eos
        self._check = check
        self.dtype, self.context = packed.layout.dtype, packed.layout.spec.context
        self.vocabulary = packed.layout.spec.vocabulary
        self.source = packed.layout.source
        self.threads: int = config.threads or torch.get_num_threads()
        kv = config.kv(packed.layout.format).name
        self.decoder = NativeDecoder(
            packed, plan, self.threads, kv, dense_kernels(packed.layout, plan), pool, read_together(packed.layout),
        )  # fmt: skip
        self._prefill = Prefill(self.decoder)
        self._shares = shares_of(packed.layout)
        self.pace = Pace()
        self._dense: NativeEngine | None = None

    def new_sequence(self, capacity: int | None = None) -> NativeSequence:
        """See :meth:`TokenEngine.new_sequence`."""
        size = min(self.context, 8192) if capacity is None else capacity
        return NativeSequence(self.decoder, self._prefill, self.policy, size)

    @property
    def kv_bytes(self) -> int:
        """See :meth:`TokenEngine.kv_bytes`; engines of other plans count together with it."""
        return self.decoder.pool.bytes

    def prompt(self, sequence: Sequence, tokens: torch.Tensor) -> Prompt:
        """See :meth:`TokenEngine.prompt`."""
        assert isinstance(sequence, NativeSequence)  # noqa: S101
        return NativePrompt(sequence, sequence.check(tokens))

    def decodes(self, sequence: Sequence, tokens: int) -> bool:
        """See :meth:`TokenEngine.decodes`."""
        assert isinstance(sequence, NativeSequence)  # noqa: S101
        return sequence.decodes(tokens)

    @property
    def replayed(self) -> int:
        """See :meth:`TokenEngine.replayed`."""
        # A policy may tell a prompt from what is decoded by the number of tokens.
        return (
            min(self.together, self.packed.layout.prefill_tokens - 1) if self.keeps_prefixes else 1
        )

    def _append(self, batch: Batch) -> torch.Tensor:
        """Decoded tokens, of whatever sequence, share passes over the weights."""
        out = torch.empty(len(batch), self.vocabulary)
        decoded: list[tuple[NativeSequence, torch.Tensor]] = []
        logits: list[torch.Tensor] = []
        with self.decoder.lock:
            for (sequence, tokens), row in zip(batch, out, strict=True):
                assert isinstance(sequence, NativeSequence)  # noqa: S101
                if sequence.decodes(len(tokens)):
                    decoded.append((sequence, tokens))
                    logits.append(row)
                else:
                    row.copy_(sequence.feed(tokens))
            decode(self.decoder, decoded, logits)
        return out

    @property
    def keeps_prefixes(self) -> bool:
        """See :meth:`TokenEngine.keeps_prefixes`.

        Not under a policy that treats a prompt's tokens unlike decoded ones: what was decoded would not
        be what a prompt computes.
        """
        return self.plan is None or self.policy.name == "all"

    def read_share(self, sequence: Sequence) -> float:
        """See :meth:`TokenEngine.read_share`; counted by the kernels."""
        assert isinstance(sequence, NativeSequence)  # noqa: S101
        return self._shares(sequence.weights_read)

    @property
    def dense(self) -> "NativeEngine":
        """The same weights without a plan: itself, if it has none."""
        if self.plan is None:
            return self
        if self._dense is None:
            self._dense = self.with_own_plan(None, prefill="all")
        return self._dense

    def with_plan(
        self, plan: SparsityPlan | None, *, threads: int | None = None, kv_dtype: str | None = None,
        prefill: str | PrefillPolicy | None = None,
    ) -> "NativeEngine":  # fmt: skip
        """The same weights in memory under another plan; costs milliseconds.

        The plan's sketches are compared with the model's, as when it was opened; the first time they may have to be
        taken from its file.

        Args:
            plan: made for this model; None for dense.
            threads: that decode; as before by default.
            kv_dtype: of the KV cache; as before by default.
            prefill: which tokens of a prompt are sparse; as before by default.

        Raises:
            PlanError: the plan was made for another model.
            ModelError: the model's file, which tells that, can no longer be read.
        """
        if plan is not None and self._check is not None:
            self._check(plan)
        return self.with_own_plan(plan, threads=threads, kv_dtype=kv_dtype, prefill=prefill)

    def with_own_plan(
        self, plan: SparsityPlan | None, *, threads: int | None = None, kv_dtype: str | None = None,
        prefill: str | PrefillPolicy | None = None,
    ) -> "NativeEngine":  # fmt: skip
        """:meth:`with_plan` for a plan made of this engine: its shapes are compared, its sketches are not."""
        config = replace(
            self.config, threads=threads or self.threads, prefill=prefill or self.policy,
            kv_dtype=kv_dtype or self.config.kv_dtype,
        )  # fmt: skip
        return NativeEngine(
            self.packed, plan, config, tokenizer=self.tokenizer, eos=self.eos, check=self._check,
            pool=self.decoder.pool,
        )  # fmt: skip
