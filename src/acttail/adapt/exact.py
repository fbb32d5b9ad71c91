"""The plan of a model whose inputs have exact zeros: it drops those, and so changes nothing."""

from dataclasses import replace
from typing import Any

import torch

from acttail.adapt.provenance import ADAPTED
from acttail.adapt.relu import Relu
from acttail.base.controls import clean
from acttail.maths.budget import HIGHEST
from acttail.model.weights import LoadedWeights, input_device
from acttail.plan import SparsityPlan, build_plan
from acttail.sparse.apply import sparsified
from acttail.sparse.counting import counting

ALLOCATOR = "relu"
_LONGEST_NOTE = 500


def exact_plan(model: Any, relu: Relu, ids: torch.Tensor, note: str) -> SparsityPlan:
    """A threshold of zero wherever ReLU makes zeros, with the share of them that some text has.

    Args:
        model: with ReLU in it; dense before and after.
        relu: what was put in.
        ids: [n, T] token ids on which zeros are counted, which is what the plan says is dropped.
        note: what was done to its weights, for the plan's provenance.
    """
    weights = LoadedWeights(model)
    names = [p.name for p in weights.projections]
    extras = {
        p.name: {"threshold": 0.0} if p.kind in relu.row.sparse else {} for p in weights.projections
    }
    plan = build_plan(
        weights, dict.fromkeys(names, 0.0), sparsity=0.0, allocator=ALLOCATOR, arguments=relu.to_dict(),
        rule="threshold", extras=extras,
    )  # fmt: skip
    with sparsified(model, plan), counting(model) as counter, torch.no_grad():
        for row in ids:
            model.get_decoder()(input_ids=row[None].to(input_device(model)), use_cache=False)
    found = {n: min(s, HIGHEST) for n, s in counter.realised().projections.items()}
    made = build_plan(
        weights, found, sparsity=None, allocator=ALLOCATOR, arguments=relu.to_dict(), rule="threshold",
        extras=extras, sketches={n: e.sketch for n, e in plan.projections.items()},
    )  # fmt: skip
    noted = made.created_with | {ADAPTED: clean(note)[:_LONGEST_NOTE]}
    return replace(made, created_with=noted)
