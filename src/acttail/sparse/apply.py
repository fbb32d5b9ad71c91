"""Apply a plan to a model in place, and undo it.

A projection keeps its module, parameters, hooks and name; only its class changes to one that keeps
the k largest entries of the input before the same linear map runs. State dicts are therefore
identical, and `densify_` gives back exactly what was there.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from acttail.model.projections import Projection, is_stacked_experts
from acttail.model.weights import LoadedWeights
from acttail.plan import SparsityPlan, same_sketch, sketch_of
from acttail.sparse.experts import SparseExperts, check_experts
from acttail.sparse.layout import fuse, lay_out
from acttail.sparse.modules import SparseModule, sparse_class, swap_class
from acttail.sparse.policy import PrefillPolicy
from acttail.sparse.rules import Rule, bind, kind_of
from acttail.sparse.state import SparseState, entry_hook, sparse_state

Model = TypeVar("Model", bound=nn.Module)


def sparsify_(
    model: Model,
    plan: SparsityPlan,
    *,
    prefill: str | PrefillPolicy = "all",
    check_contents: bool = True,
    native: bool = False,
) -> Model:
    """Make a model sparse in place: each projection keeps the k largest entries of its input.

    So does the output head if the plan has an entry for it; a weight tied to the embedding stays so.

    Exact TopK per token, as docs/theory.md defines it. Works under `generate`, any batch size,
    padding, float32, bfloat16 and float16, and `torch.compile(fullgraph=True)`. `save_pretrained`
    writes the plan into the config.

    Args:
        model: a causal LM of transformers, dense or sparse (a new plan replaces the old one).
        plan: made for this model.
        prefill: which tokens are sparse: ``all``, ``first_dense=N``, ``last_fraction=F``,
            ``decode_only``.
        check_contents: compare the weights with those the plan was made from.
        native: lay the weights of nn.Linear projections out input-major, in place, so that passes of up
            to 8 rows read only the kept ones (rule ``topk``; float32 and bfloat16 on a CPU, float16 too on
            a CUDA or ROCm device with Triton). For whole-token speed on a CPU use
            :class:`acttail.engine.Engine`; on a GPU `generate` with a static cache.

    Returns:
        The same model.

    Raises:
        PlanError: the plan was made for another model; names the first difference.
        ModelError: not a decoder, or experts of a form that is not supported.
        ActTailError: unknown prefill policy.
    """
    policy = PrefillPolicy.parse(prefill)
    if sparse_state(model) is not None:
        densify_(model)
    weights = LoadedWeights(model)
    plan.check(weights, contents=check_contents)
    if weights.packed_from:
        plan = _of_what_is_there(plan, weights)
    state = SparseState(plan, policy, native=native)
    watch = kind_of(plan).watch
    watched: dict[str, Rule] = {}
    if watch is not None:
        found = watch(model, plan, plan.covered(weights))
        watched, state.taps = found.rules, found.handles
    stacked: dict[str, dict[str, list[Rule]]] = defaultdict(lambda: defaultdict(list))
    plain: list[tuple[nn.Module, Projection, Rule]] = []
    for p in plan.covered(weights):
        module = model.get_submodule(p.module)
        rule = watched.get(p.name) or bind(
            plan, plan.projections[p.name], partial(_column_norms, weights, p)
        )
        if is_stacked_experts(module):
            check_experts(p.module, module)
            stacked[p.module][p.parameter].append(rule)
        else:
            plain.append((module, p, rule))
    for module, p, rule in plain:
        swap_class(module, sparse_class(type(module), SparseModule))
        vars(module).update(acttail_rule=rule, acttail_name=p.name, acttail_state=state)
    if native:
        fused = fuse(plain)
        lay_out(module for module, p, _ in plain if p.name not in fused)
        for module, p, _ in plain:
            vars(module)["acttail_group"] = fused.get(p.name)
    for path, rules in stacked.items():
        module = model.get_submodule(path)
        swap_class(module, sparse_class(type(module), SparseExperts))
        vars(module).update(acttail_rules=dict(rules), acttail_name=path, acttail_state=state)
    if policy.name != "all":
        state.handle = entry_hook(model)
        state.head = plan.head[0] if plan.head is not None else None
    vars(model)["acttail_state"] = state
    _note_in_config(model, state)
    return model


def _of_what_is_there(plan: SparsityPlan, weights: LoadedWeights) -> SparsityPlan:
    """The plan with sketches of what packing changed: by those a checkpoint saved from here is known."""
    entries = dict(plan.projections)
    for p in plan.covered(weights):
        own = sketch_of(weights, p)
        if not same_sketch(entries[p.name].sketch, own):
            entries[p.name] = replace(entries[p.name], sketch=own)
    return replace(plan, projections=entries)


def _column_norms(weights: LoadedWeights, projection: Projection) -> torch.Tensor:
    """[d_in] float32."""
    norms: torch.Tensor = weights.weight(projection).float().norm(dim=0)
    return norms


def _note_in_config(model: nn.Module, state: SparseState) -> None:
    """Let save_pretrained write the plan, unless another quantizer holds the model's one slot."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    from acttail.sparse.hf_config import ActTailConfig

    existing = getattr(model.config, "quantization_config", None)
    if existing is None or isinstance(existing, ActTailConfig):
        model.config.quantization_config = ActTailConfig(state.plan.to_dict(), str(state.policy))
        state.config_owned = True


@contextmanager
def sparsified(
    model: Any, plan: SparsityPlan, *, prefill: str | PrefillPolicy = "all"
) -> Iterator[None]:
    """Inside, a model is sparse under a plan whose contents are not compared again; after it, dense.

    Args:
        model: as for :func:`sparsify_`, which also says what is raised.
        plan: made of this very model.
        prefill: which tokens are sparse.
    """
    sparsify_(model, plan, prefill=prefill, check_contents=False)
    try:
        yield
    finally:
        densify_(model)


def densify_(model: Model) -> Model:
    """Undo :func:`sparsify_`: the model is again what it was, bit for bit.

    Args:
        model: a sparse model; a dense one is returned untouched.
    """
    state = sparse_state(model)
    if state is None:
        return model
    if state.native:
        lay_out((m for m in model.modules() if isinstance(m, SparseModule)), back=True)
    for module in model.modules():
        if isinstance(module, SparseModule | SparseExperts):
            swap_class(module, type(module).__bases__[1])
            for key in (
                "acttail_rule",
                "acttail_rules",
                "acttail_name",
                "acttail_state",
                "acttail_group",
            ):
                vars(module).pop(key, None)
    if state.handle is not None:
        state.handle.remove()
    for tap in state.taps:
        tap.remove()
    vars(model).pop("acttail_state", None)
    config = getattr(model, "config", None)
    if state.config_owned and config is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    return model
