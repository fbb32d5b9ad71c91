"""Selection rules: which entries of an input vector stay.

A rule is bound to one projection and maps [..., d] to the same shape with the dropped entries zeroed.
TopK is the definition; the others exist because peers use them and are compared fairly here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from acttail.ops import topk_mask

NAMES = ("topk", "wina", "threshold", "top-p", "cats")


@dataclass(frozen=True)
class TopK:
    """Keep the k entries of largest magnitude.

    Attributes:
        k: entries that stay.
    """

    k: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d]."""
        return topk_mask(x, self.k)

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """[rows] int64: entries that stay in each row of x."""
        return torch.full((x.numel() // x.shape[-1],), self.k)


@dataclass
class ScaledTopK:
    """Keep the k entries of largest |x_j| * scale_j.

    With the weight's column norms as scale this is WINA (Chen et al. 2025, arXiv 2505.19427).

    Attributes:
        k: entries that stay.
        scale: [d] float32, positive.
    """

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


@dataclass(frozen=True)
class Threshold:
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


@dataclass(frozen=True)
class TopP:
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


@dataclass
class GateTap:
    """What the gate of one MLP last gave; a hook on the gate's module fills it.

    Attributes:
        activation: of the MLP, applied to the gate's output.
        threshold: magnitude of the activated gate below which an intermediate entry is dropped.
        drop: [..., d_ff] bool, True where it is dropped; None before the first pass.
    """

    activation: Callable[[torch.Tensor], torch.Tensor]
    threshold: float
    drop: torch.Tensor | None = None

    def __call__(self, module: Any, args: Any, output: torch.Tensor) -> None:
        """The hook: [..., d_ff] gate output."""
        self.drop = self.activation(output).abs() <= self.threshold


@dataclass
class GateThreshold:
    """CATS (Lee et al. 2024, arXiv 2404.08763): the activated gate decides for `up` and `down`.

    Entries of the intermediate vector whose gate is small are dropped: `down` does not read them, and
    `up` need not compute them. `up`'s input stays whole; what it saves are rows of its weight, which
    :meth:`kept` counts as the same share of its input.

    Attributes:
        tap: of the gate in the same MLP.
        output: True for `up`, whose output is dropped (by what `down` then masks), False for `down`.
    """

    tap: GateTap
    output: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d]."""
        if self.output or self.tap.drop is None:
            return x
        return torch.where(self.tap.drop, torch.zeros((), dtype=x.dtype, device=x.device), x)

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """[rows] int64: entries that stay in each row of x, or would at the same cost."""
        assert self.tap.drop is not None  # noqa: S101  (the gate runs before up and down)
        stay = (~self.tap.drop).flatten(0, -2)
        return (stay.sum(-1) * x.shape[-1] / stay.shape[-1]).round().long()


Rule = TopK | ScaledTopK | Threshold | TopP | GateThreshold
