"""Prefill policies: which tokens of a sequence meet the sparse weights.

`all` is the default and the only one under which a perplexity speaks of every token; the others
exist to compare with work that reports less (docs/theory.md, "Protocol").
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from acttail.errors import ActTailError


@dataclass(frozen=True)
class PrefillPolicy:
    """Which tokens are sparse.

    Attributes:
        name: ``all``, ``first_dense`` (the first `value` tokens of a sequence stay dense),
            ``last_fraction`` (only the last share `value` of what is prefilled is sparse, and all
            that is decoded) or ``decode_only`` (prefill dense, decoded tokens sparse).
        value: the policy's number, 0 where it takes none.
    """

    name: str = "all"
    value: float = 0.0

    @classmethod
    def parse(cls, text: "str | PrefillPolicy") -> "PrefillPolicy":
        """Read ``all``, ``first_dense=N``, ``last_fraction=F`` or ``decode_only``.

        Raises:
            ActTailError: anything else.
        """
        if isinstance(text, PrefillPolicy):
            return text
        name, _, number = text.partition("=")
        try:
            value = float(number) if number else 0.0
        except ValueError:
            value = math.nan
        valid = {
            "all": not number,
            "decode_only": not number,
            "first_dense": bool(number) and value >= 0 and value.is_integer(),
            "last_fraction": bool(number) and 0 < value <= 1,
        }
        if not valid.get(name, False):
            raise ActTailError(
                f"unknown prefill policy {text!r}: use all, first_dense=N, last_fraction=F with "
                "0 < F <= 1, or decode_only"
            )
        return cls(name, value)

    @classmethod
    def choose(
        cls, asked: "str | PrefillPolicy | None", own: "str | PrefillPolicy | None" = None
    ) -> "PrefillPolicy":
        """The policy that was asked for; without one the model's own, else ``all``.

        Args:
            asked: by the user; None to leave it to the model.
            own: that the model was saved or made sparse with, None if it has none.

        Raises:
            ActTailError: see :meth:`parse`.
        """
        return cls.parse(next((p for p in (asked, own) if p is not None), "all"))

    def __str__(self) -> str:
        if self.name == "first_dense":
            return f"first_dense={int(self.value)}"
        return f"last_fraction={self.value:g}" if self.name == "last_fraction" else self.name

    def sparse_rows(
        self,
        batch: int,
        tokens: int,
        past: int,
        attention_mask: torch.Tensor | None,
        wanted: int = 0,
    ) -> torch.Tensor | bool:
        """Which tokens of one forward pass are sparse.

        Args:
            batch: sequences in the pass.
            tokens: tokens per sequence in the pass.
            past: tokens already in the KV cache.
            attention_mask: [batch, past + tokens], 0 at padding; None without padding.
            wanted: logits asked for, from the end of the pass; 0 for all, or if nobody said.

        Returns:
            True if all are, False if none, else [batch, tokens] bool.
        """
        if self.name == "all":
            return True
        if self.name == "decode_only":
            return self._decoded_rows(batch, tokens, past, wanted)
        if self.name == "last_fraction" and past > 0:
            return True
        if attention_mask is not None and attention_mask.dim() == 2:
            # Position among the real tokens, so that padding on the left shifts nothing.
            positions = (attention_mask.long().cumsum(-1) - 1)[:, -tokens:]
            lengths = attention_mask.long().sum(-1, keepdim=True)
        else:
            positions = torch.arange(past, past + tokens).expand(batch, tokens)
            lengths = torch.full((batch, 1), past + tokens)
        if self.name == "first_dense":
            return positions >= int(self.value)
        return positions >= lengths - torch.round(lengths * self.value).long()

    @staticmethod
    def _decoded_rows(batch: int, tokens: int, past: int, wanted: int) -> torch.Tensor | bool:
        """Which tokens of a pass are decoded rather than part of a prompt.

        Assisted decoding verifies several drawn tokens in a pass. It asks for the logits of each and of the
        token before them, where a prompt, whole or in chunks, asks for the last one's.
        """
        if past > 0 and tokens in (1, wanted):
            return True
        drawn = wanted - 1
        if not 0 < drawn < tokens:
            return False
        return (torch.arange(tokens) >= tokens - drawn).expand(batch, tokens)


def past_length(cache: Any) -> int:
    """Tokens in a transformers cache, 0 for None."""
    if cache is None:
        return 0
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if callable(length) else 0
