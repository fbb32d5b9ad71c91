"""`cats`: the activated gate decides which intermediate entries an MLP computes.

CATS (Lee et al. 2024, arXiv 2404.08763): a threshold on |act(gate)|, taken from the dense model on
calibration text; `up` and `down` skip the entries below it, `gate` and the attention stay dense. Half of
a Llama-like block can be skipped at most.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from acttail.allocate.base import AllocationContext, Allocator, Array
from acttail.budget import HIGHEST, check_target, model_sparsity
from acttail.calibrate import Calibration
from acttail.errors import BudgetError, ModelError
from acttail.projections import find_projections, gated_mlps
from acttail.sparsify import activation_of
from acttail.thresholds import quantile


def allocate(context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]) -> Array:
    """[P] one sparsity for every `up` and `down`, 0 elsewhere.

    Raises:
        ModelError: no MLP has gate, up and down projections of its own.
        BudgetError: the target is beyond what up and down can give; names the largest.
    """
    target = check_target(sparsity)
    touched = {p.name for _, *pair in gated_mlps(context.projections) for p in pair}
    if not touched:
        raise ModelError("cats needs MLPs with gate, up and down projections; this model has none")
    mask = np.array([p.name in touched for p in context.projections], dtype=np.float64)
    reach = HIGHEST * model_sparsity(mask, context.costs)
    if target > reach + 1e-9:
        raise BudgetError(
            f"cats reaches a model sparsity of {reach:.3f} at most, not {target}; it touches up and down only"
        )
    return mask * min(target * HIGHEST / reach, HIGHEST)


def gate_thresholds(
    calibration: Calibration, sparsities: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Quantiles of |act(gate)| in the dense model.

    Args:
        calibration: model and text.
        sparsities: projection name -> wanted sparsity.

    Returns:
        name -> {"threshold": t} for `up` and `down`; nothing for the others.
    """
    model = calibration.model
    batches = calibration.batches().to(next(model.parameters()).device)
    samples: dict[str, list[torch.Tensor]] = defaultdict(list)
    handles = []
    mlps = gated_mlps(find_projections(model))
    for gate, _, _ in mlps:
        activation = activation_of(model.get_submodule(gate.module.rpartition(".")[0]))

        def see(
            _m: Any, _a: Any, output: torch.Tensor, name: str = gate.name, f: Any = activation
        ) -> None:
            samples[name].append(f(output).abs().float().flatten().cpu())

        handles.append(model.get_submodule(gate.module).register_forward_hook(see))
    try:
        with torch.inference_mode():
            for index, ids in enumerate(batches):
                model(input_ids=ids[None], use_cache=False)
                if calibration.progress is not None:
                    calibration.progress(index + 1, len(batches))
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, dict[str, float]] = {name: {} for name in sparsities}
    for gate, up, down in mlps:
        if sparsities[down.name] > 0:
            value = quantile(samples[gate.name], sparsities[down.name])
            found[up.name] = found[down.name] = {"threshold": value}
    return found


CATS = Allocator(
    "cats", "calibrated: CATS, thresholds on the activated gate for up and down alone", {}, allocate,
    needs_text=True, rule="cats",
)  # fmt: skip
