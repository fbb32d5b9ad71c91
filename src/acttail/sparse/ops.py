"""The operators as torch sees them: schema, fake, gradient; the backend is picked by the tensors' device.

``ACTTAIL_BACKEND`` (reference, cpu or triton) forces one wherever it runs.

`torch.ops.acttail.topk_mask(x, k)` and `torch.ops.acttail.sparse_linear(x, weight, bias, k)` work
eagerly, under autograd and under `torch.compile(fullgraph=True)`.
"""

from typing import Any

import torch

from acttail.sparse.backends import cpu, reference, triton
from acttail.sparse.backends.choice import wanted

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
    if wanted("triton", default=False) and triton.supports(x):
        return triton.topk_mask(x, k)
    native = wanted("cpu") and cpu.supports(x)
    return cpu.topk_mask(x, k) if native else reference.topk_mask(x, k)


def _cuda(x: torch.Tensor, k: int) -> torch.Tensor:
    _check(x, k)
    fits = wanted("triton") and triton.supports(x)
    return triton.topk_mask(x, k) if fits else reference.topk_mask(x, k)


_library.impl("topk_mask", _any_device, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("topk_mask", _cpu, "CPU")  # type: ignore[no-untyped-call]
_library.impl("topk_mask", _cuda, "CUDA")  # type: ignore[no-untyped-call]


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


# Up to so many rows the native product reads the kept weights alone; above it one masked GEMM is faster.
NATIVE_ROWS = 8

_library.define("sparse_linear(Tensor x, Tensor weight, Tensor? bias, int k) -> Tensor")  # type: ignore[no-untyped-call]


def _linear_any(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int
) -> torch.Tensor:
    return torch.nn.functional.linear(topk_mask(x, k), weight, bias)


def _linear_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int
) -> torch.Tensor:
    _check(x, k)
    if wanted("triton", default=False):
        return _linear_cuda(x, weight, bias, k)
    rows = x.numel() // x.shape[-1]
    if (
        not wanted("cpu")
        or not 1 <= rows <= NATIVE_ROWS
        or not cpu.input_major(weight)
        or x.dtype != weight.dtype
    ):
        return _linear_any(x, weight, bias, k)
    y = cpu.sparse_linear(x, weight, k)
    return y if bias is None else y + bias


def _linear_cuda(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int
) -> torch.Tensor:
    _check(x, k)
    rows = x.numel() // x.shape[-1]
    fits = wanted("triton") and triton.supports(x) and x.dtype == weight.dtype
    if not fits or not 1 <= rows <= triton.ROWS or not triton.input_major(weight):
        return _linear_any(x, weight, bias, k)
    return triton.sparse_linear(x, weight, bias, k)


_library.impl("sparse_linear", _linear_any, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("sparse_linear", _linear_cpu, "CPU")  # type: ignore[no-untyped-call]
_library.impl("sparse_linear", _linear_cuda, "CUDA")  # type: ignore[no-untyped-call]


@torch.library.register_fake("acttail::sparse_linear", lib=_library)  # type: ignore[untyped-decorator]
def _linear_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_setup(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    x, weight, bias, k = inputs
    ctx.save_for_backward(x, weight)
    ctx.k, ctx.biased = k, bias is not None


def _linear_backward(ctx: Any, gradient: torch.Tensor) -> Any:
    x, weight = ctx.saved_tensors
    kept = topk_mask(x, ctx.k)
    to_x = (gradient @ weight) * (kept != 0)
    flat = gradient.reshape(-1, gradient.shape[-1])
    to_weight = flat.T @ kept.reshape(-1, kept.shape[-1])
    return to_x, to_weight, flat.sum(0) if ctx.biased else None, None


torch.library.register_autograd(
    "acttail::sparse_linear", _linear_backward, setup_context=_linear_setup, lib=_library
)


def sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int
) -> torch.Tensor:
    """The linear map of the k largest entries of each row: TopK(x) Wᵀ + b.

    For up to :data:`NATIVE_ROWS` rows and a weight laid out input-major (see
    :func:`acttail.sparse.backends.cpu.to_input_major`), only the kept columns of W are read: by the native
    kernels on a CPU, by Triton's on a CUDA or ROCm device.

    Args:
        x: [..., d_in] floating point.
        weight: [d_out, d_in], the same dtype.
        bias: [d_out] or None.
        k: entries to keep, 1 <= k <= d_in.

    Returns:
        [..., d_out] in x's dtype.

    Raises:
        ValueError: k is outside [1, d_in].
    """
    return torch.ops.acttail.sparse_linear(x, weight, bias, k)  # type: ignore[no-any-return]


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
