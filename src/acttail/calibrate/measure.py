"""Sensitivity curves: how much the model's output suffers as one projection grows sparser.

F_i(s) = ½ E_t[(g_t · W_i (x_t - TopK_s(x_t)))²], with g_t the gradient, with respect to the projection's
output, of the sum of log-probabilities of tokens sampled from the model: the Fisher-weighted, second
order estimate of the KL divergence per token.

This file is the run over the text: windows, seeds, progress and resume. The maths are in
:mod:`acttail.calibrate.energies`, the losses in :mod:`acttail.calibrate.losses`.
"""

from contextlib import closing

import numpy as np

from acttail.base.dtypes import name_of
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.curves import Array, SensitivityCurves
from acttail.calibrate.elsewhere import add_window, measured
from acttail.calibrate.energies import SELECTIONS, EnergySums
from acttail.calibrate.losses import LOSSES
from acttail.calibrate.partial import PartialSums
from acttail.errors import ActTailError
from acttail.model.projections import find_all


def measure(
    calibration: Calibration,
    *,
    loss: str = "fisher",
    selection: str = "topk",
    grid: tuple[float, ...] | None = None,
    resume: bool = True,
) -> SensitivityCurves:
    """Measure the curves of every projection and of the output head, one backward pass per window.

    Memory is bounded by one block's activations plus one hidden state per block. After each window
    the sums are written to the cache; a run that was killed goes on from there and gives the same
    result, for each window draws from a seed of its own. So does a Ray cluster that measures windows side by side
    (:attr:`Calibration.elsewhere`).

    Args:
        calibration: model and text.
        loss: ``fisher`` (default; docs/log.md); ``output``, the relative error of the projection's
            own output, which needs no gradient of the model; or ``kl``, the measured KL divergence to
            the dense model's logits with that projection alone sparse, one pass per point.
        selection: ``topk``, or ``threshold``: one magnitude for all tokens of a window, so that a token
            with large inputs keeps more. Must be the rule that will run; not for ``kl``.
        grid: sparsities at which the curves are taken, ascending, the first 0; None for the default.
        resume: read and write partial results in the cache folder.

    Returns:
        The curves.

    Raises:
        ActTailError: unknown loss or a bad grid.
        TextError: the text is too short.
    """
    if loss not in LOSSES:
        raise ActTailError(f"unknown loss {loss!r}: use {' or '.join(LOSSES)}")
    row = LOSSES[loss]
    if selection not in SELECTIONS or selection not in row.selections:
        raise ActTailError(f"curves of {loss} cannot be taken under the selection {selection!r}")
    grid = grid or row.grid
    points = _checked(grid)
    model = calibration.model
    batches = calibration.batches()
    sums = EnergySums({p.name: p.d_in for p in find_all(model)}, points, selection)
    partial = (
        PartialSums(calibration.key("curves", loss, selection, tuple(grid))) if resume else None
    )
    first = partial.read(sums) if partial else 0
    windows = {
        index: (batches[index : index + 1], calibration.seed * 1_000_003 + index)
        for index in range(first, len(batches))
    }
    if calibration.elsewhere is None:
        parts = (add_window(model, loss, ids, seed, sums.empty()) for ids, seed in windows.values())
    else:
        parts = measured(calibration.elsewhere, model, loss, windows, sums.empty())
    # Window by window in their order, wherever each was measured: sums depend on how they are added up.
    with closing(parts):
        for index, part in zip(windows, parts, strict=True):
            sums.merge(part)
            if partial:
                partial.write(index + 1, sums)
            if calibration.progress is not None:
                calibration.progress(index + 1, len(batches))
    # A loss with a scale is relative to it; the others are means over tokens.
    curves = {
        name: _monotone(total.numpy() / (sums.scale[name] or batches.numel()))
        for name, total in sums.sums.items()
    }
    about = {
        "loss": loss, "selection": selection, "text": calibration.text.name, "tokens": str(batches.numel()),
        "window": str(batches.shape[1]), "seed": str(calibration.seed),
        "dtype": name_of(model.dtype),
    }  # fmt: skip
    return SensitivityCurves(points, curves, about)


def _checked(grid: tuple[float, ...]) -> Array:
    """[G] the grid's points.

    Raises:
        ActTailError: it does not ascend from 0 to at most 0.99, or has fewer than 3 points.
    """
    points = np.asarray(grid, dtype=np.float64)
    if len(points) < 3 or points[0] != 0 or not (np.diff(points) > 0).all() or points[-1] > 0.99:
        raise ActTailError(
            "a grid of sparsities ascends from 0 to at most 0.99, with 3 points or more"
        )
    return points


def _monotone(values: Array) -> Array:
    return np.maximum.accumulate(np.maximum(values, 0.0))
