"""`threshold`: what exceeds a magnitude stays. The fast mode, calibrated on text for one sparsity."""

from dataclasses import dataclass

import torch

from acttail.plan import ProjectionPlan
from acttail.sparse.rules.base import NativeCode, NativeRule, Norms, Rule, RuleKind


@dataclass(frozen=True)
class Threshold(Rule):
    """Keep the entries with |x_j| > threshold, whatever their number.

    Attributes:
        threshold: in units of the input, >= 0.
    """

    threshold: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d]."""
        # Written so that NaN stays: a broken input must remain visible.
        return torch.where(
            x.abs() <= self.threshold, torch.zeros((), dtype=x.dtype, device=x.device), x
        )

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """[rows] int64: entries that stay in each row of x."""
        return (~(x.abs() <= self.threshold)).sum(-1).flatten()

    @property
    def native(self) -> NativeRule:
        """See :attr:`Rule.native`."""
        return NativeRule(NativeCode.THRESHOLD, threshold=self.threshold)


def _bind(entry: ProjectionPlan, norms: Norms) -> Rule:
    assert entry.threshold is not None  # noqa: S101  (left dense otherwise)
    return Threshold(entry.threshold)


THRESHOLD = RuleKind(
    "threshold", Threshold, bind=_bind, native=NativeCode.THRESHOLD,
)  # fmt: skip
