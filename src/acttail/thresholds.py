"""Thresholds per projection: the fast mode, an approximation of TopK that needs no selection.

A threshold is the quantile of |x| at the wanted sparsity. It is taken on the *sparse* model's own
activations, block by block through the same pass: thresholds from the dense model drift, because a
damaged input is smaller than the one they were measured on.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch

from acttail.calibrate import Calibration, probing
from acttail.ops import topk_mask

# Magnitudes kept per projection for the quantile; the sampling error of a sparsity is below 0.1 %.
_SAMPLES = 400_000


def thresholds(
    calibration: Calibration, sparsities: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """A magnitude threshold for every projection.

    Args:
        calibration: model and text.
        sparsities: projection name -> wanted sparsity.

    Returns:
        name -> {"threshold": t} with |x| <= t dropped; nothing for a projection left dense.
    """
    from acttail.budget import kept_entries

    model = calibration.model
    batches = calibration.batches().to(next(model.parameters()).device)
    per_batch = max(1, _SAMPLES // len(batches))
    samples: dict[str, list[torch.Tensor]] = defaultdict(list)

    def probe(name: str, x: torch.Tensor) -> torch.Tensor:
        magnitudes = x.detach().abs().float().flatten()
        stride = max(1, magnitudes.numel() // per_batch)
        samples[name].append(magnitudes[::stride].cpu())
        return topk_mask(x, kept_entries(sparsities[name], x.shape[-1]))

    with torch.inference_mode(), probing(model, probe):
        for index, ids in enumerate(batches):
            model(input_ids=ids[None], use_cache=False)
            if calibration.progress is not None:
                calibration.progress(index + 1, len(batches))
    found: dict[str, dict[str, float]] = {}
    for name, s in sparsities.items():
        found[name] = {}
        if s > 0 and samples[name]:
            ordered = torch.cat(samples[name]).sort().values
            found[name]["threshold"] = float(ordered[min(int(s * len(ordered)), len(ordered) - 1)])
    return found
