"""The plan of an adapted model: the same budget, the new weights, and a note of what was done to them."""

from dataclasses import replace
from typing import Any

from acttail.base.controls import clean
from acttail.model.weights import LoadedWeights
from acttail.plan import SparsityPlan, created_with, sketch_of

# Key of a plan's `created_with` under which an adapted model says so.
ADAPTED = "adapted"
_LONGEST_NOTE = 500


def sketched_again(plan: SparsityPlan, model: Any, note: str) -> SparsityPlan:
    """The same budget for a model whose weights have changed since.

    Args:
        plan: of the model as it was.
        model: dense or sparse.
        note: what was done to it, for the plan's provenance.
    """
    weights = LoadedWeights(model)
    entries = {
        p.name: replace(plan.projections[p.name], sketch=sketch_of(weights, p))
        for p in plan.covered(weights)
    }
    made_with = created_with() | {ADAPTED: clean(note)[:_LONGEST_NOTE]}
    return replace(plan, projections=entries, created_with=made_with)
