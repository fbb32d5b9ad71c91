"""`cats`: the activated gate decides which intermediate entries an MLP computes.

CATS (Lee et al. 2024, arXiv 2404.08763): a threshold on |act(gate)|, taken from the dense model on
calibration text; `up` and `down` skip the entries below it, `gate` and the attention stay dense. Half of
a Llama-like block can be skipped at most.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from acttail.allocate.base import AllocationContext, Allocator, Array, confined
from acttail.calibrate import Calibration
from acttail.errors import ModelError
from acttail.projections import find_projections, gated_mlps
from acttail.sparsify import activation_of
from acttail.thresholds import quantile


def allocate(context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]) -> Array:
    """[P] one sparsity for every `up` and `down`, 0 elsewhere.

    Raises:
        ModelError: no MLP has gate, up and down projections of its own.
        BudgetError: the target is beyond what up and down can give; names the largest.
    """
    touched = {p.name for _, *pair in gated_mlps(context.projections) for p in pair}
    if not touched:
        raise ModelError("cats needs MLPs with gate, up and down projections; this model has none")
    return confined(context, sparsity, touched, "cats", "it touches up and down only")


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
        calibration.forward(calibration.batches())
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
