"""`top-p`: the largest entries stay until they hold a share of the input's magnitude."""

from dataclasses import dataclass

import torch

from acttail.plan import ProjectionPlan
from acttail.sparse.rules.base import Norms, Rule, RuleKind


@dataclass(frozen=True)
class TopP(Rule):
    """Keep the smallest set of largest entries whose magnitudes sum to the share p of all of them.

    The rule of *Universal Properties of Activation Sparsity in Modern LLMs* (arXiv 2509.00454).

    Attributes:
        p: share of the row's L1 norm that stays, in (0, 1].
    """

    p: float

    def _keep(self, x: torch.Tensor) -> torch.Tensor:
        ordered, index = torch.sort(x.abs().float(), dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        keep = ~(before >= self.p * ordered.sum(-1, keepdim=True))
        keep[..., 0] = True
        return torch.zeros_like(keep).scatter_(-1, index, keep)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d]."""
        return torch.where(self._keep(x), x, torch.zeros((), dtype=x.dtype, device=x.device))

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """[rows] int64: entries that stay in each row of x."""
        return self._keep(x).sum(-1).flatten()


def _bind(entry: ProjectionPlan, norms: Norms) -> Rule:
    assert entry.p is not None  # noqa: S101  (left dense otherwise)
    return TopP(entry.p)


TOP_P = RuleKind(
    "top-p", TopP, bind=_bind,
    at_level=lambda sparsity, d_in: TopP(max(1 - sparsity, 1e-6)),
)  # fmt: skip
