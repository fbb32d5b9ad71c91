"""The reference implementation of every operator, in pure torch, for any device and dtype.

It is what the other backends are tested against, so it is written to be obviously right.
"""

from collections.abc import Sequence

import torch

# Integer type of a float's own width and the bit pattern of its +infinity.
_BITS = {
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}


def magnitude_keys(x: torch.Tensor) -> torch.Tensor:
    """Integers that order like the magnitude of x, with NaN above infinity and all NaNs equal.

    Args:
        x: any shape, float64, float32, bfloat16 or float16.

    Returns:
        A tensor of x's shape, in the integer dtype of x's width.

    Raises:
        TypeError: x has another dtype.
    """
    if x.dtype not in _BITS:
        raise TypeError(f"TopK is defined for floating point inputs, not for {x.dtype}")
    integer, infinity = _BITS[x.dtype]
    sign_off = torch.iinfo(integer).max
    return (x.contiguous().view(integer) & sign_off).clamp(max=infinity + 1)


def topk_mask(x: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k entries of largest magnitude of each row and zero the others.

    Ties go to the lower index; NaN ranks above infinity, infinity above every number, so that a
    broken input stays visible.

    Args:
        x: [..., d], floating point.
        k: how many entries of the last dimension stay, 1 <= k <= d.

    Returns:
        A new tensor of x's shape and dtype.
    """
    keys = magnitude_keys(x)
    # A stable sort keeps equal magnitudes in index order; torch.topk does not promise that.
    order = torch.sort(keys, dim=-1, descending=True, stable=True).indices[..., :k]
    keep = torch.zeros_like(keys, dtype=torch.bool).scatter_(-1, order, True)
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))


def partial_energies(
    x: torch.Tensor, vectors: Sequence[torch.Tensor], dropped: torch.Tensor
) -> torch.Tensor:
    """Half the squared loss of v · x when the smallest entries of x are dropped, summed over rows.

    Args:
        x: [rows, d] floating point.
        vectors: n tensors [rows, d].
        dropped: [G] int64, ascending: how many entries each point drops, in TopK's order.

    Returns:
        [n, G] float64: sum over rows of ½ (sum of v_j x_j over the dropped j)².
    """
    # TopK keeps the lower index of a tie, so the higher one is dropped first.
    order = torch.sort(magnitude_keys(x), dim=-1, descending=True, stable=True).indices.flip(-1)
    rows = []
    for v in vectors:
        products = (x.double() * v.double()).gather(-1, order)
        running = torch.nn.functional.pad(products.cumsum(-1), (1, 0))  # [rows, d + 1]
        rows.append(0.5 * running[:, dropped.to(x.device)].square().sum(0).cpu())
    return torch.stack(rows)
