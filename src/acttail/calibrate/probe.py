"""See, and replace, the input of every projection while a dense model runs."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from acttail.model.weights import LoadedWeights
from acttail.plan import build_plan
from acttail.sparse.apply import densify_, sparsify_
from acttail.sparse.state import sparse_state


@contextmanager
def probing(
    model: Any, probe: Callable[[str, torch.Tensor], torch.Tensor], *, head: bool = False
) -> Iterator[None]:
    """Let `probe` see the input of every projection, experts included, and replace it.

    The model is dense before and after.

    Args:
        model: a causal LM of transformers.
        probe: (name, input) -> what the projection is given instead.
        head: let it see that of the output head, too, if the model has one.
    """
    source_state = sparse_state(model)
    if source_state is None:
        weights = LoadedWeights(model)
        names = [p.name for p in weights.projections]
        if head and weights.head is not None:
            names.append(weights.head.name)
        # A plan that lives as long as this block: nobody compares its contents, so no weight is read.
        plan = build_plan(
            weights, dict.fromkeys(names, 0.0), sparsity=0.0, allocator="uniform", arguments={},
            sketches=dict.fromkeys(names, (math.nan, math.nan)),
        )  # fmt: skip
        sparsify_(model, plan, check_contents=False)
    state = sparse_state(model)
    assert state is not None  # noqa: S101
    before, state.probe = state.probe, probe
    try:
        yield
    finally:
        state.probe = before
        if source_state is None:
            densify_(model)
