"""`cats`: the activated gate decides which intermediate entries an MLP computes.

CATS (Lee et al. 2024, arXiv 2404.08763): a threshold on |act(gate)|, taken from the dense model on
calibration text; `up` and `down` skip the entries below it, `gate` and the attention stay dense. Half of
a Llama-like block can be skipped at most.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from acttail.allocate.base import Allocation, Allocator, confined
from acttail.allocate.context import AllocationContext
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.thresholds import Extras, quantile
from acttail.errors import ModelError
from acttail.model.projections import find_projections, gated_mlps
from acttail.sparse.rules import cats as rule


def allocate(
    context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]
) -> Allocation:
    """One sparsity for every `up` and `down`, 0 elsewhere.

    Raises:
        ModelError: no MLP has gate, up and down projections of its own.
        BudgetError: the target is beyond what up and down can give; names the largest.
    """
    touched = {p.name for _, *pair in gated_mlps(context.projections) for p in pair}
    if not touched:
        raise ModelError("cats needs MLPs with gate, up and down projections; this model has none")
    return Allocation(confined(context, sparsity, touched, "cats", "it touches up and down only"))


def gate_thresholds(calibration: Calibration, sparsities: Mapping[str, float]) -> Extras:
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
        activation = rule.activation_of(model.get_submodule(gate.module.rpartition(".")[0]))

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
    found: Extras = {name: {} for name in sparsities}
    for gate, up, down in mlps:
        if sparsities[down.name] > 0:
            value = quantile(samples[gate.name], sparsities[down.name])
            found[up.name] = found[down.name] = {"threshold": value}
    return found


CATS = Allocator(
    "cats", "calibrated: CATS, thresholds on the activated gate for up and down alone", {}, allocate,
    rule=rule.CATS, fixed_rule=True, calibrate=gate_thresholds,
    head=False,
)  # fmt: skip
