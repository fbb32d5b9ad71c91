"""Thresholds per projection: the fast mode, an approximation of TopK that needs no selection.

A threshold is the quantile of |x| at the wanted sparsity. It is taken on the *sparse* model's own
activations, block by block through the same pass: thresholds from the dense model drift, because a
damaged input is smaller than the one they were measured on.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

import torch

from acttail.calibrate.calibration import Calibration
from acttail.calibrate.probe import probing
from acttail.maths.budget import kept_entries
from acttail.model.projections import find_head
from acttail.sparse.ops import topk_mask
from acttail.sparse.rules import Threshold

# Projection name -> further fields of its entry in the plan.
Extras = dict[str, dict[str, float]]
# (calibration, projection name -> wanted sparsity) -> the fields that text decides.
Calibrate = Callable[[Calibration, Mapping[str, float]], Extras]

# Magnitudes kept per projection for the quantile; the sampling error of a sparsity is below 0.1 %.
_SAMPLES = 400_000


def thresholds(calibration: Calibration, sparsities: Mapping[str, float]) -> Extras:
    """A magnitude threshold for every projection.

    Two passes: the first runs under TopK, the second under the first one's thresholds, so that the
    quantiles are those of the model that will run (on SmolLM2-135M the realised sparsity then drifts
    by 0.4-0.7 % on other text, against 2.3 % with thresholds of the dense model).

    Args:
        calibration: model and text.
        sparsities: projection name -> wanted sparsity.

    Returns:
        name -> {"threshold": t} with |x| <= t dropped; nothing for a projection left dense.
    """
    first = _pass(
        calibration,
        sparsities,
        lambda name, x: topk_mask(x, kept_entries(sparsities[name], x.shape[-1])),
    )

    def under(name: str, x: torch.Tensor) -> torch.Tensor:
        return Threshold(first[name])(x) if name in first else x

    second = _pass(calibration, sparsities, under)
    return {name: {"threshold": second[name]} if name in second else {} for name in sparsities}


def _pass(
    calibration: Calibration, sparsities: Mapping[str, float],
    select: Callable[[str, torch.Tensor], torch.Tensor],
) -> dict[str, float]:  # fmt: skip
    """Quantiles of |x| at the wanted sparsities, while the model runs under `select`."""
    samples = _samples(calibration, select, sparsities)
    return {
        name: quantile(samples[name], s)
        for name, s in sparsities.items()
        if s > 0 and samples[name]
    }


def _samples(
    calibration: Calibration,
    select: Callable[[str, torch.Tensor], torch.Tensor],
    wanted: Collection[str],
    *,
    signed: bool = False,
) -> dict[str, list[torch.Tensor]]:
    """Evenly spaced input entries of the wanted projections, magnitudes unless signed."""
    batches = calibration.batches()
    head = find_head(calibration.model)
    per_batch = max(1, _SAMPLES // len(batches))
    samples: dict[str, list[torch.Tensor]] = defaultdict(list)

    def probe(name: str, x: torch.Tensor) -> torch.Tensor:
        values = x.detach().flatten()
        values = values[:: max(1, values.numel() // per_batch)].float()
        samples[name].append((values if signed else values.abs()).cpu())
        return select(name, x)

    with (
        torch.inference_mode(),
        probing(calibration.model, probe, head=head is not None and head.name in wanted),
    ):
        calibration.forward(batches)
    return samples


def quantile(samples: list[torch.Tensor], sparsity: float) -> float:
    """The value below which the share `sparsity` of the samples lies.

    Args:
        samples: 1-D float32 tensors, taken together.
        sparsity: in [0, 1).
    """
    ordered = torch.cat(samples).sort().values
    return float(ordered[min(int(sparsity * len(ordered)), len(ordered) - 1)])


# TEAL's histograms have about as many bins.
_BINS = 10_000


def histogram_threshold(samples: torch.Tensor, sparsity: float) -> float:
    """TEAL's threshold icdf(1/2 + s/2) from a histogram of signed activations (arXiv 2408.14690, §4.1).

    Exact for a distribution symmetric about zero; otherwise the realised sparsity is off.

    Args:
        samples: [n] float, activations with their sign.
        sparsity: in [0, 1).

    Returns:
        A magnitude, >= 0.
    """
    counts, edges = torch.histogram(samples.float().cpu(), bins=_BINS)
    cumulative = torch.cat([torch.zeros(1), counts.cumsum(0)]) / counts.sum()
    wanted = 0.5 + sparsity / 2
    upper = int(torch.searchsorted(cumulative, wanted).clamp(1, _BINS))
    low, high = float(cumulative[upper - 1]), float(cumulative[upper])
    share = (wanted - low) / (high - low) if high > low else 0.0
    return max(0.0, float(edges[upper - 1] + share * (edges[upper] - edges[upper - 1])))


def teal_thresholds(calibration: Calibration, sparsities: Mapping[str, float]) -> Extras:
    """TEAL's thresholds: from the dense model's activations, in one pass.

    Args:
        calibration: model and text.
        sparsities: projection name -> wanted sparsity.

    Returns:
        As :func:`thresholds`.
    """
    samples = _samples(calibration, lambda name, x: x, sparsities, signed=True)
    return {
        name: {"threshold": histogram_threshold(torch.cat(samples[name]), s)}
        if s > 0 and samples[name]
        else {}
        for name, s in sparsities.items()
    }
