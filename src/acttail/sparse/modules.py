"""Linear modules whose input is masked first, and the change of a module's class in place."""

import functools
from typing import Any, TypeGuard

import torch
from torch import nn

from acttail.sparse.layout import FusedInput
from acttail.sparse.ops import sparse_linear
from acttail.sparse.rules import Rule, TopK
from acttail.sparse.state import SparseState, select


def _is_linear(module: Any) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear)


class Made:
    """Base of the mix-ins: classes made at run time have no name to be found by when they are unpickled."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copies and pickles: the two classes it is made of, and the module's own dict."""
        mixin, cls = type(self).__bases__
        # A group computes with its own view of the weights, which a copy's are no longer part of.
        kept = {name: value for name, value in vars(self).items() if name != "acttail_group"}
        return _empty, (cls, mixin), kept


class SparseModule(Made):
    """Mix-in of a linear module whose input is masked first."""

    acttail_rule: Rule
    acttail_name: str
    acttail_state: SparseState
    acttail_group: FusedInput | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The original linear map of the masked input: [..., d_in] -> [..., d_out]."""
        state, rule, name = self.acttail_state, self.acttail_rule, self.acttail_name
        group = self.acttail_group
        if state.native and isinstance(rule, TopK) and state.plain and _is_linear(self):
            if group is not None and group.takes(x):
                return group(name, x)
            return sparse_linear(x, self.weight, self.bias, rule.k)
        masked = select(x, rule, state, name)
        return super().forward(masked)  # type: ignore[misc, no-any-return]

    def extra_repr(self) -> str:
        """The original description with the rule appended."""
        return f"{super().extra_repr()}, {self.acttail_rule}"  # type: ignore[misc]


class SparseLinear(SparseModule, nn.Linear):
    """nn.Linear that keeps the k largest entries of each input vector."""


def sparse_class(cls: type[nn.Module], mixin: type) -> type[nn.Module]:
    """The class of a module with the mix-in put before it; made once."""
    return _made_class(cls, mixin)  # type: ignore[no-any-return, arg-type]


@functools.cache
def _made_class(cls: Any, mixin: type) -> Any:
    if cls is nn.Linear:
        return SparseLinear
    return type(f"Sparse{cls.__name__}", (mixin, cls), {"__module__": __name__})


def _empty(cls: type[nn.Module], mixin: type) -> nn.Module:
    """A module of the class with the mix-in before it, still without its dict."""
    made = sparse_class(cls, mixin)
    return made.__new__(made)


def swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, in place."""
    module.__class__ = cls
    # accelerate wraps the bound forward of the class it found (device maps, offload): rebind it.
    if hasattr(module, "_old_forward"):
        module._old_forward = cls.forward.__get__(module)
