"""Losses, divergences and their standard errors, from logits."""

import math

import torch
import torch.nn.functional as F  # noqa: N812

# Logits are turned into losses this many positions at a time: 128 rows of a 256k vocabulary in
# float32 take 131 MB.
_ROWS = 128


def divergence(dense: torch.Tensor, sparse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(dense || sparse) and whether both rank the same token first, per position.

    Args:
        dense: [T, vocabulary] logits.
        sparse: [T, vocabulary] logits.

    Returns:
        ([T] float32 nats, [T] float32 of 0 and 1).
    """
    kl, same = [], []
    for i in range(0, dense.shape[0], _ROWS):
        p = torch.log_softmax(dense[i : i + _ROWS].float(), dim=-1)
        q = torch.log_softmax(sparse[i : i + _ROWS].float(), dim=-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).float())
    return torch.cat(kl), torch.cat(same)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, in float32, a few rows at a time.

    Args:
        logits: [T, vocabulary].
        targets: [T] int64.

    Returns:
        [T] float32, nats.
    """
    parts = [
        F.cross_entropy(logits[i : i + _ROWS].float(), targets[i : i + _ROWS], reduction="none")
        for i in range(0, targets.numel(), _ROWS)
    ]
    return torch.cat(parts)


def clustered_mean(values: torch.Tensor, mask: torch.Tensor) -> tuple[float, float | None]:
    """Mean over scored positions, and its standard error with each window as one cluster.

    Neighbouring tokens are correlated, windows hardly: the ratio estimator's variance over windows
    (Cochran 1977, eq. 6.13).

    Args:
        values: [windows, T].
        mask: [windows, T] bool, True where scored.
    """
    v = torch.where(mask, values, 0).double().sum(1)
    n = mask.double().sum(1)
    mean = float(v.sum() / n.sum())
    count = values.shape[0]
    if count < 2:
        return mean, None
    residual = v - mean * n
    variance = float(residual.square().sum()) / (count - 1) * count
    return mean, math.sqrt(variance) / float(n.sum())
