"""Whether thresholds pay: their loss and that of TopK at equal share, on text that calibration has not seen.

A threshold lets a token keep more or less than another. That gains where the size of an input says how much it
matters, and loses where it does not; which of the two holds differs from model to model and from sparsity to sparsity.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from acttail.calibrate.calibration import Calibration
from acttail.calibrate.probe import probing
from acttail.calibrate.text import bos_of, tokenize, windows
from acttail.calibrate.thresholds import Extras
from acttail.maths.budget import HIGHEST, kept_entries
from acttail.maths.losses import divergence
from acttail.model.projections import find_head
from acttail.model.weights import LoadedWeights, input_device
from acttail.sparse.ops import topk_mask
from acttail.sparse.rules import Threshold

# Scored at most: the three passes over them take about as long as the two that set thresholds on 4,096.
TOKENS = 2048

Select = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Compared:
    """What two selections of equal share cost.

    Attributes:
        thresholds: KL to the dense model under thresholds, nats per token.
        topk: the same under TopK at the share that the thresholds realised.
        tokens: scored.
    """

    thresholds: float
    topk: float
    tokens: int


def against_topk(
    calibration: Calibration, sparsities: Mapping[str, float], extras: Extras
) -> Compared:
    """Run the model dense, under thresholds and under TopK over held-out windows.

    Thresholds drift on other text. So TopK drops, window by window, what they dropped in all: sparsities are scaled
    by what was realised over what was wanted.

    Args:
        calibration: model and text; what its tokens leave of the text is scored, or, where that is less than a
            window, its last windows.
        sparsities: projection name -> wanted sparsity.
        extras: of :func:`acttail.calibrate.thresholds.thresholds` for them.
    """
    model = calibration.model
    rules = {name: Threshold(e["threshold"]) for name, e in extras.items() if e}
    weights, head = LoadedWeights(model), find_head(model)
    costs = {p.name: p.cost for p in [*weights.projections, *([head] if head else [])]}
    batches = _held_out(calibration).to(input_device(model))
    losses: dict[str, list[torch.Tensor]] = {"thresholds": [], "topk": []}
    dropped: dict[str, float] = {}

    def under_thresholds(name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in rules:
            return x
        if x.numel():
            kept = rules[name].kept(x).double().mean()
            dropped[name] = 1 - float(kept) / x.shape[-1]
        return rules[name](x)

    for ids in batches:
        dense = _logits(calibration, ids, lambda _, x: x, wanted=rules)
        dropped.clear()
        sparse = _logits(calibration, ids, under_thresholds, wanted=rules)
        losses["thresholds"].append(divergence(dense, sparse)[0])
        del sparse
        realised = sum(costs[name] * share for name, share in dropped.items())
        wanted = sum(costs[name] * sparsities[name] for name in dropped)
        scale = realised / wanted if wanted else 1.0

        def under_topk(name: str, x: torch.Tensor, scale: float = scale) -> torch.Tensor:
            if name not in rules:
                return x
            return topk_mask(x, kept_entries(min(scale * sparsities[name], HIGHEST), x.shape[-1]))

        losses["topk"].append(
            divergence(dense, _logits(calibration, ids, under_topk, wanted=rules))[0]
        )
    means = {name: float(torch.cat(found).double().mean()) for name, found in losses.items()}
    return Compared(**means, tokens=sum(len(part) for part in losses["topk"]))


def _held_out(calibration: Calibration) -> torch.Tensor:
    """[windows, window] token ids after those of calibration; its own last ones where none are left."""
    own = calibration.batches()
    window = own.shape[1]
    count = max(1, TOKENS // window)
    rest = tokenize(calibration.text, calibration.tokenizer)[own.numel() :]
    if rest.numel() < window:
        return own[-count:]
    return windows(
        rest, window, count * window, None, bos_of(calibration.tokenizer), calibration.text.name
    )


def _logits(
    calibration: Calibration, ids: torch.Tensor, select: Select, *, wanted: Mapping[str, object]
) -> torch.Tensor:
    """[T - 1, vocabulary] of one window, while the model runs under `select`."""
    model = calibration.model
    head = find_head(model)
    with (
        torch.inference_mode(),
        probing(model, select, head=head is not None and head.name in wanted),
    ):
        logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return logits
