"""The operators as torch sees them: schema, fake, gradient; the backend is picked by the device.

`torch.ops.acttail.topk_mask(x, k)` works eagerly, under autograd and under
`torch.compile(fullgraph=True)`.
"""

from typing import Any

import torch

from acttail.backends import cpu, reference

_library = torch.library.Library("acttail", "DEF")  # type: ignore[no-untyped-call]
_library.define("topk_mask(Tensor x, int k) -> Tensor")  # type: ignore[no-untyped-call]


def _check(x: torch.Tensor, k: int) -> None:
    if x.dim() == 0 or not 1 <= k <= x.shape[-1]:
        raise ValueError(
            f"topk_mask keeps 1 <= k <= d entries, got k={k} for shape {tuple(x.shape)}"
        )


def _any_device(x: torch.Tensor, k: int) -> torch.Tensor:
    _check(x, k)
    return reference.topk_mask(x, k)


def _cpu(x: torch.Tensor, k: int) -> torch.Tensor:
    _check(x, k)
    return cpu.topk_mask(x, k) if cpu.supports(x) else reference.topk_mask(x, k)


_library.impl("topk_mask", _any_device, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("topk_mask", _cpu, "CPU")  # type: ignore[no-untyped-call]


@torch.library.register_fake("acttail::topk_mask", lib=_library)  # type: ignore[untyped-decorator]
def _fake(x: torch.Tensor, k: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, int], output: torch.Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    # The selection is piecewise constant, so the gradient passes where an entry was kept.
    (output,) = ctx.saved_tensors
    return gradient * (output != 0), None


torch.library.register_autograd(
    "acttail::topk_mask", _backward, setup_context=_setup_context, lib=_library
)


def topk_mask(x: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k entries of largest magnitude in each row of x; the others become zero.

    Ties go to the lower index, NaN ranks above infinity (docs/theory.md, "TopK"). Differentiable:
    the gradient passes through the entries that were kept.

    Args:
        x: [..., d], floating point, any device.
        k: entries to keep, 1 <= k <= d.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        ValueError: k is outside [1, d].
        TypeError: x is not floating point.
    """
    return torch.ops.acttail.topk_mask(x, k)  # type: ignore[no-any-return]
