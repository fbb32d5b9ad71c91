"""`topk` and `wina`: the k largest entries stay, by magnitude or by magnitude times a scale.

TopK is the definition (docs/theory.md); the other rules exist because peers use them and are compared
fairly here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from acttail.maths.budget import kept_entries
from acttail.sparse.ops import topk_mask
from acttail.sparse.rules.base import NativeCode, NativeRule, Rule, RuleKind


@dataclass(frozen=True)
class TopK(Rule):
    """Keep the k entries of largest magnitude.

    Attributes:
        k: entries that stay.
    """

    fixed_k: ClassVar[bool] = True
    k: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d]."""
        return topk_mask(x, self.k)

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """[rows] int64: entries that stay in each row of x."""
        return torch.full((x.numel() // x.shape[-1],), self.k)

    @property
    def native(self) -> NativeRule:
        """See :attr:`Rule.native`."""
        return NativeRule(NativeCode.TOPK, k=self.k)


@dataclass
class ScaledTopK(Rule):
    """Keep the k entries of largest |x_j| * scale_j.

    With the weight's column norms as scale this is WINA (Chen et al. 2025, arXiv 2505.19427).

    Attributes:
        k: entries that stay.
        scale: [d] float32, positive.
    """

    fixed_k: ClassVar[bool] = True
    k: int
    scale: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d]."""
        if self.scale.device != x.device:
            self.scale = self.scale.to(x.device)
        # The mask is taken in float32: rounding scores to bfloat16 would make ties of what differs.
        kept = topk_mask(x.float() * self.scale, self.k)
        # A kept zero stays zero either way; NaN compares unequal to zero and so stays visible.
        return torch.where(kept != 0, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """[rows] int64: entries that stay in each row of x."""
        return torch.full((x.numel() // x.shape[-1],), self.k)

    @property
    def native(self) -> NativeRule:
        """See :attr:`Rule.native`."""
        return NativeRule(NativeCode.TOPK, k=self.k, score_scale=self.scale)


TOPK = RuleKind(
    "topk", TopK,
    bind=lambda entry, norms: TopK(entry.k), native=NativeCode.TOPK, replannable=True,
    at_level=lambda sparsity, d_in: TopK(kept_entries(sparsity, d_in)),
)  # fmt: skip
WINA = RuleKind(
    "wina", ScaledTopK,
    bind=lambda entry, norms: ScaledTopK(entry.k, norms()), native=NativeCode.TOPK, replannable=True,
)  # fmt: skip
