"""`cats`: the activated gate decides what `up` and `down` keep (Lee et al. 2024, arXiv 2404.08763)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from acttail.errors import ModelError
from acttail.model.projections import Projection, gated_mlps
from acttail.plan import SparsityPlan
from acttail.sparse.rules.base import Dense, Rule, RuleKind, Watched


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
class GateThreshold(Rule):
    """Entries of the intermediate vector whose gate is small are dropped.

    `down` does not read them, and `up` need not compute them. `up`'s input stays whole; what it saves
    are rows of its weight, which :meth:`kept` counts as the same share of its input.

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


def activation_of(mlp: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation of a gated MLP of transformers.

    Raises:
        ModelError: it is not where transformers keeps it.
    """
    for name in ("act_fn", "activation_fn"):
        found = getattr(mlp, name, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    raise ModelError(f"cannot tell the activation of {type(mlp).__name__}")


def _tap_gates(model: nn.Module, plan: SparsityPlan, projections: Sequence[Projection]) -> Watched:
    """Rules of `up` and `down`; each MLP's gate gets a hook that both look at."""
    found = Watched({}, [])
    for gate, up, down in gated_mlps(list(projections)):
        threshold = plan.projections[down.name].threshold
        if threshold is None:
            continue
        mlp = model.get_submodule(gate.module.rpartition(".")[0])
        tap = GateTap(activation_of(mlp), threshold)
        found.handles.append(model.get_submodule(gate.module).register_forward_hook(tap))
        found.rules[up.name] = GateThreshold(tap, output=True)
        found.rules[down.name] = GateThreshold(tap, output=False)
    return found


CATS = RuleKind(
    "cats", GateThreshold, bind=lambda entry, norms: Dense(), watch=_tap_gates,
)  # fmt: skip
