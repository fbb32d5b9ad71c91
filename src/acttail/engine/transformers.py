"""transformers' own forward pass, for what the native engine does not run."""

import copy
from typing import Any

import torch

from acttail.base.dtypes import name_of
from acttail.engine.base import Engine
from acttail.engine.text import eos_of
from acttail.errors import ActTailError
from acttail.model.weights import LoadedWeights, input_device
from acttail.plan import SparsityPlan
from acttail.sparse.apply import densify_, sparsify_
from acttail.sparse.policy import PrefillPolicy


class TransformersSequence:
    """A sequence of a transformers model, dense or sparse in place.

    Args:
        model: causal LM.
        capacity: longest sequence.
    """

    def __init__(self, model: Any, capacity: int) -> None:
        from transformers import DynamicCache

        self._model, self.capacity = model, capacity
        self._cache = DynamicCache(config=model.config)

    @property
    def length(self) -> int:
        """Positions held."""
        return int(self._cache.get_seq_length())

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self._cache.crop(length)

    def fork(self, length: int, capacity: int) -> "TransformersSequence":
        """See :meth:`acttail.engine.protocol.Sequence.fork`; a copy."""
        found = TransformersSequence(self._model, capacity)
        found._cache = copy.deepcopy(self._cache)
        found.truncate(length)
        return found

    def bytes_for(self, tokens: int) -> int:
        """See :meth:`acttail.engine.protocol.Sequence.bytes_for`: not counted."""
        return 0

    def check(self, tokens: torch.Tensor) -> torch.Tensor:
        """See :meth:`acttail.engine.protocol.Sequence.check`."""
        tokens = tokens.to(torch.int64).reshape(-1)
        if self.length + len(tokens) > self.capacity:
            raise ActTailError(
                f"{self.length} + {len(tokens)} tokens are more than the sequence's {self.capacity}"
            )
        vocabulary = self._model.get_input_embeddings().num_embeddings
        if not len(tokens) or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            raise ActTailError(f"token ids must be from 0 to {vocabulary - 1}, and at least one")
        return tokens

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """See :meth:`acttail.engine.protocol.Sequence.feed`."""
        tokens = self.check(tokens)
        device = input_device(self._model)
        with torch.inference_mode():
            out = self._model(
                input_ids=tokens.reshape(1, -1).to(device), past_key_values=self._cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        logits: torch.Tensor = out.logits[0, -1].float().cpu()
        return logits


class TransformersEngine(Engine):
    """A transformers model that generates.

    Attributes:
        model: the causal LM, sparse in place if there is a plan.
    """

    name = "transformers"
    one_plan = "the transformers engine keeps one plan; use the native engine"

    def __init__(
        self, model: Any, plan: SparsityPlan | None, tokenizer: Any, prefill: str | PrefillPolicy,
        reason: str | None,
    ) -> None:  # fmt: skip
        self.model, self.plan, self.tokenizer, self.reason = model, plan, tokenizer, reason
        if plan is not None:
            sparsify_(model, plan, prefill=prefill)
        else:
            densify_(model)
        self.dtype = name_of(model.dtype)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context = int(limit or 8192)
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        self.source = LoadedWeights(model).name
        self.eos = eos_of(model.generation_config, tokenizer)

    def new_sequence(self, capacity: int | None = None) -> TransformersSequence:
        """See :meth:`TokenEngine.new_sequence`."""
        return TransformersSequence(self.model, capacity or self.context)
