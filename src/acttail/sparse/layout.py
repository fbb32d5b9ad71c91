"""How a native sparse model's weights lie in memory: input-major, and side by side where an input is shared.

On a GPU q, k, v (and gate, up) read one vector: their weights become one buffer [d_in, outputs of all], of
which each module keeps its own view, and one selection and one product serve all of them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import nn

from acttail.model.projections import Projection
from acttail.sparse.backends import triton
from acttail.sparse.backends.choice import wanted
from acttail.sparse.backends.cpu import to_input_major
from acttail.sparse.rules import Rule, TopK

# What the native products of each kind of device take.
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_MOST_MEMBERS = 3
# Outputs of a member begin on whole tiles of the product.
_ALIGN = 64


class FusedInput:
    """Projections that read one vector, on a GPU.

    The first member that is called computes the outputs of all; the others take theirs if they are given
    the very same tensor, unchanged, and compute again if not.

    Args:
        names: of the projections.
        weight: [d_in, sum of the widths, each rounded up to 64].
        bias: the same number of entries, or None.
        ks: entries that each keeps.
        widths: outputs of each.
    """

    def __init__(
        self, names: Sequence[str], weight: torch.Tensor, bias: torch.Tensor | None, ks: Sequence[int],
        widths: Sequence[int],
    ) -> None:  # fmt: skip
        self.names, self.weight, self.bias = tuple(names), weight, bias
        self.ks, self.widths = tuple(ks), tuple(widths)
        self._seen: tuple[torch.Tensor, int] | None = None
        self._waiting: dict[str, torch.Tensor] = {}

    def takes(self, x: torch.Tensor) -> bool:
        """Whether a pass is one this serves: few rows, no gradient, not being compiled."""
        return (
            1 <= x.numel() // x.shape[-1] <= triton.ROWS
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and x.dtype == self.weight.dtype
        )

    def __call__(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """[..., d_in] -> the output [..., width] of one member."""
        version = 0 if x.is_inference() else x._version
        same = self._seen is not None and self._seen[0] is x and self._seen[1] == version
        if not same or name not in self._waiting:
            room = [-(-w // _ALIGN) * _ALIGN for w in self.widths]
            outputs = triton.fused_linear(x, self.weight, self.ks, room, self.bias)
            own = [y[..., :width] for y, width in zip(outputs, self.widths, strict=True)]
            self._waiting = dict(zip(self.names, own, strict=True))
            self._seen = (x, version)
        found = self._waiting.pop(name)
        if not self._waiting:
            self._seen = None
        return found


def lay_out(modules: Iterable[nn.Module], *, back: bool = False) -> None:
    """Change the memory layout of linear weights to input-major, or back; values stay.

    Args:
        modules: nn.Linear modules whose weights native products take are changed, others are left.
        back: to torch's own layout instead.
    """
    for module in modules:
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or not isinstance(weight, nn.Parameter):
            continue
        on_cpu = weight.device.type == "cpu" and weight.dtype in _CPU_DTYPES
        if on_cpu or triton.supports(weight):
            old = weight.data
            weight.data = old.contiguous() if back else to_input_major(old)


def fuse(
    members: Sequence[tuple[nn.Module, Projection, Rule]],
) -> dict[str, FusedInput]:
    """Put the weights of projections that share an input side by side, in place.

    Args:
        members: the sparse linear modules with their projections and rules.

    Returns:
        Projection name -> the group it belongs to; nothing for those that stand alone, are not TopK, or
        are on a device that Triton does not serve.
    """
    groups: dict[frozenset[str], list[tuple[nn.Linear, Projection, TopK]]] = defaultdict(list)
    for module, p, rule in members:
        if isinstance(module, nn.Linear) and isinstance(rule, TopK) and _served(module.weight):
            groups[frozenset((p.name, *p.shared_input))].append((module, p, rule))
    found: dict[str, FusedInput] = {}
    for names, group in groups.items():
        first = group[0][0]
        alike = all(
            m.weight.dtype == first.weight.dtype and m.weight.device == first.weight.device
            and (m.bias is None) == (first.bias is None)
            for m, _, _ in group
        )  # fmt: skip
        if not 1 < len(group) <= _MOST_MEMBERS or len(group) != len(names) or not alike:
            continue
        widths = [m.out_features for m, _, _ in group]
        room = [-(-w // _ALIGN) * _ALIGN for w in widths]
        weight = first.weight.data.new_zeros(first.in_features, sum(room))
        bias = None if first.bias is None else first.bias.data.new_zeros(sum(room))
        for (module, _, _), start in zip(group, accumulate([0, *room[:-1]]), strict=True):
            part = weight[:, start : start + module.out_features].T
            module.weight.data = part.copy_(module.weight.data)
            if bias is not None:
                bias[start : start + module.out_features] = module.bias.data
        made = FusedInput(
            [p.name for _, p, _ in group], weight, bias, [r.k for _, _, r in group], widths
        )
        found |= {p.name: made for _, p, _ in group}
    return found


def _served(weight: torch.Tensor) -> bool:
    forced = wanted("triton", default=False)
    return triton.supports(weight) and wanted("triton") and (weight.device.type == "cuda" or forced)
