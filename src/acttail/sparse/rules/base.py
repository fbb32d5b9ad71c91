"""What a selection rule is: the rule bound to one projection, and the row that stands for its name.

Nothing outside this package asks for a rule by its name: what differs between rules is a field of the
row or a method of the bound rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import nn

from acttail.model.projections import Projection
from acttail.plan import RULES as NEEDS
from acttail.plan import ProjectionPlan, SparsityPlan

# The weight's column norms [d_in] float32; called by the rules that score with them alone.
Norms = Callable[[], torch.Tensor]


class NativeCode(IntEnum):
    """enum acttail_rule of native/engine.h."""

    DENSE = 0
    TOPK = 1
    THRESHOLD = 2


@dataclass(frozen=True)
class NativeRule:
    """What the native engine is told of one projection.

    Attributes:
        code: how its kernels select.
        k: entries that stay, for TOPK.
        threshold: magnitude at or below which an entry is dropped, for THRESHOLD.
        score_scale: [d_in] float32 that magnitudes are multiplied by before TOPK ranks them, or None.
    """

    code: NativeCode
    k: int = 0
    threshold: float = 0.0
    score_scale: torch.Tensor | None = None


class Rule:
    """A rule bound to one projection: a function of its input.

    Attributes:
        fixed_k: whether every row keeps the same number of entries, so that a plan's k is what runs.
    """

    fixed_k: ClassVar[bool] = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d] with the dropped entries zeroed."""
        raise NotImplementedError

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """[rows] int64: entries that stay in each row of x."""
        raise NotImplementedError

    @property
    def native(self) -> NativeRule | None:
        """What the native engine is told; None if it does not run the rule."""
        return None


@dataclass(frozen=True)
class Dense(Rule):
    """Keep everything."""

    fixed_k: ClassVar[bool] = True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The input itself."""
        return x

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """See :meth:`Rule.kept`."""
        return torch.full((x.numel() // x.shape[-1],), x.shape[-1])

    @property
    def native(self) -> NativeRule:
        """See :attr:`Rule.native`."""
        return NativeRule(NativeCode.DENSE)


@dataclass(frozen=True)
class Watched:
    """Rules that look at more of the model than their own input.

    Attributes:
        rules: projection name -> its rule.
        handles: of the hooks the rules look through; removed when the model becomes dense again.
    """

    rules: dict[str, Rule]
    handles: list[Any]


@dataclass(frozen=True)
class RuleKind:
    """One row of the registry: all that is said of a rule by name.

    Attributes:
        name: as plans write it.
        rule: class of the bound rule.
        bind: (entry, column norms) -> the rule of a projection that is not left dense.
        native: how the native engine selects; None if it does not run the rule.
        replannable: whether a plan of it at another sparsity follows from the sparsities alone.
        watch: (model, plan, projections) -> rules that need hooks; None for a rule of the input alone.
        at_level: (sparsity, d_in) -> the rule without a plan, where one number makes it; else None.
    """

    name: str
    rule: type[Rule]
    bind: Callable[[ProjectionPlan, Norms], Rule]
    native: NativeCode | None = None
    replannable: bool = False
    watch: Callable[[nn.Module, SparsityPlan, Sequence[Projection]], Watched] | None = None
    at_level: Callable[[float, int], Rule] | None = None

    @property
    def fixed_k(self) -> bool:
        """See :attr:`Rule.fixed_k`."""
        return self.rule.fixed_k

    @property
    def needs(self) -> str | None:
        """Field of a plan's entry without which the projection is left dense; None if k says all."""
        return NEEDS[self.name]
