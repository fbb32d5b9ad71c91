"""Apply a plan to a model in place, and undo it.

A projection keeps its module, parameters, hooks and name; only its class changes to one that keeps
the k largest entries of the input before the same linear map runs. State dicts are therefore
identical, and `densify_` gives back exactly what was there.
"""

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from acttail.backends.cpu import to_input_major
from acttail.budget import model_sparsity
from acttail.checkpoint import LoadedWeights
from acttail.errors import ActTailError, ModelError, PlanError
from acttail.ops import sparse_linear
from acttail.plan import SparsityPlan
from acttail.prefill import PrefillPolicy, past_length
from acttail.projections import Projection, gated_mlps, is_stacked_experts
from acttail.rules import GateTap, GateThreshold, Rule, ScaledTopK, Threshold, TopK, TopP

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class SparseState:
    """What all sparse modules of one model share.

    Attributes:
        plan: the plan that was applied.
        policy: which tokens are sparse.
        rows: for the pass under way: True (all), False (none) or [batch, tokens] bool.
        counts: projection name -> [entries kept, entries seen] while counting, else None.
        probe: while calibrating, sees each projection's input instead of the rule and returns what
            the projection is given; else None.
        handle: the model's hook, for policies that need to see each pass.
        native: whether weights are input-major, so that a few rows read the kept ones alone.
        taps: handles of the hooks on gates, under the rule ``cats``.
    """

    plan: SparsityPlan
    policy: PrefillPolicy
    rows: torch.Tensor | bool = True
    counts: dict[str, list[int]] | None = None
    probe: Callable[[str, torch.Tensor], torch.Tensor] | None = None
    handle: Any = None
    taps: list[Any] = field(default_factory=list)
    config_owned: bool = field(default=False)
    native: bool = False

    @property
    def plain(self) -> bool:
        """Whether nothing watches: every row is sparse, no counting, no probe."""
        return self.rows is True and self.counts is None and self.probe is None


def _select(
    x: torch.Tensor, rule: Rule, state: SparseState, name: str, index: torch.Tensor | None = None
) -> torch.Tensor:
    """The input with the dropped entries zeroed, in the rows that are sparse.

    Args:
        x: [..., d].
        rule: which entries stay.
        state: the model's state.
        name: the projection's name, for counting.
        index: the tokens that x's rows come from, where a router has picked some.
    """
    if state.probe is not None:
        return state.probe(name, x)
    d = x.shape[-1]
    rows = state.rows
    if rows is True:
        y = rule(x)
        if state.counts is not None:
            _count(state.counts[name], int(rule.kept(x).sum()), x.numel())
        return y
    if rows is False:
        y, kept = x, x.numel()
    else:
        assert isinstance(rows, torch.Tensor)  # noqa: S101
        flat = rows.reshape(-1).to(x.device)
        flat = flat if index is None else flat[index]
        if flat.numel() * d != x.numel():
            raise ActTailError(
                f"the prefill policy {state.policy} cannot tell which token is which in {name}: it "
                f"sees {x.numel() // d} rows for {flat.numel()} tokens; use the policy 'all'"
            )
        keep = flat.reshape(*x.shape[:-1], 1)
        y, kept = torch.where(keep, rule(x), x), 0
        if state.counts is not None:
            kept = int(torch.where(flat, rule.kept(x).to(flat.device), d).sum())
    if state.counts is not None:
        _count(state.counts[name], kept, x.numel())
    return y


def _count(counts: list[int], kept: int, seen: int) -> None:
    counts[0] += kept
    counts[1] += seen


def _is_linear(module: Any) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear)


class SparseModule:
    """Mix-in of a linear module whose input is masked first."""

    acttail_rule: Rule
    acttail_name: str
    acttail_state: SparseState

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The original linear map of the masked input: [..., d_in] -> [..., d_out]."""
        state, rule = self.acttail_state, self.acttail_rule
        if state.native and isinstance(rule, TopK) and state.plain and _is_linear(self):
            return sparse_linear(x, self.weight, self.bias, rule.k)
        masked = _select(x, rule, state, self.acttail_name)
        return super().forward(masked)  # type: ignore[misc, no-any-return]

    def extra_repr(self) -> str:
        """The original description with the rule appended."""
        return f"{super().extra_repr()}, {self.acttail_rule}"  # type: ignore[misc]


class SparseLinear(SparseModule, nn.Linear):
    """nn.Linear that keeps the k largest entries of each input vector."""


class SparseExperts:
    """Mix-in of transformers' stacked experts: each expert masks its inputs with its own k."""

    acttail_rules: dict[str, list[Rule]]
    acttail_name: str
    acttail_state: SparseState

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [tokens, d].
            top_k_index: [tokens, top_k] expert indices.
            top_k_weights: [tokens, top_k].
        """
        output = torch.zeros_like(hidden_states)
        entry = "gate_up_proj" if self.has_gate else "up_proj"  # type: ignore[attr-defined]
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:  # type: ignore[attr-defined]
                continue  # the slot of a token that goes nowhere
            token, slot = torch.where(top_k_index == expert)
            hidden = self._project(entry, expert, hidden_states[token], token)
            gated = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)  # type: ignore[attr-defined]
            out = self._project("down_proj", expert, gated, token)
            if getattr(self, "has_post_expert_norm", False):
                out = self.post_expert_norm(out)  # type: ignore[attr-defined]
            out = out * top_k_weights[token, slot, None]
            output.index_add_(0, token, out.to(output.dtype))
        return output

    def _project(
        self, parameter: str, expert: int, x: torch.Tensor, token: torch.Tensor
    ) -> torch.Tensor:
        name = f"{self.acttail_name}.{parameter}.{expert}"
        masked = _select(x, self.acttail_rules[parameter][expert], self.acttail_state, name, token)
        weight = getattr(self, parameter)[expert]
        if getattr(self, "is_transposed", False):
            weight = weight.T
        bias = getattr(self, f"{parameter}_bias", None)
        return F.linear(masked, weight, None if bias is None else bias[expert])


def _sparse_class(cls: type[nn.Module], mixin: type) -> type[nn.Module]:
    return _made_class(cls, mixin)  # type: ignore[no-any-return, arg-type]


@functools.cache
def _made_class(cls: Any, mixin: type) -> Any:
    if cls is nn.Linear:
        return SparseLinear
    return type(f"Sparse{cls.__name__}", (mixin, cls), {"__module__": __name__})


def _swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    # accelerate wraps the bound forward of the class it found (device maps, offload): rebind it.
    if hasattr(module, "_old_forward"):
        module._old_forward = cls.forward.__get__(module)


def entry_hook(state: SparseState, model: nn.Module) -> Any:
    """Let a policy see each pass: a hook on the model that works out which rows are sparse."""
    signature = inspect.signature(model.forward)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise ActTailError(
                f"the prefill policy {state.policy} needs input_ids or inputs_embeds"
            )
        state.rows = state.policy.sparse_rows(
            tokens.shape[0], tokens.shape[1], past_length(given.get("past_key_values")),
            given.get("attention_mask"),
        )  # fmt: skip

    return model.register_forward_pre_hook(before, with_kwargs=True)


def sparse_state(model: nn.Module) -> SparseState | None:
    """The state of a sparse model, None if it is dense."""
    return getattr(model, "acttail_state", None)


def sparsify_(
    model: Model,
    plan: SparsityPlan,
    *,
    prefill: str | PrefillPolicy = "all",
    check_contents: bool = True,
    native: bool = False,
) -> Model:
    """Make a model sparse in place: each projection keeps the k largest entries of its input.

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
            to 8 rows read only the kept ones (float32 and bfloat16 on a CPU, rule ``topk``). For
            whole-token speed use :class:`acttail.engine.Engine`.

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
    state = SparseState(plan, policy, native=native)
    gated = _tap_gates(model, plan, weights, state) if plan.rule == "cats" else {}
    stacked: dict[str, dict[str, list[Rule]]] = defaultdict(lambda: defaultdict(list))
    plain: list[tuple[nn.Module, str, Rule]] = []
    for p in weights.projections:
        module = model.get_submodule(p.module)
        rule = gated.get(p.name) or _rule_of(plan, weights, p)
        if is_stacked_experts(module):
            _check_experts(p.module, module)
            stacked[p.module][p.parameter].append(rule)
        else:
            plain.append((module, p.name, rule))
    for module, name, rule in plain:
        _swap_class(module, _sparse_class(type(module), SparseModule))
        vars(module).update(acttail_rule=rule, acttail_name=name, acttail_state=state)
    if native:
        _lay_out(module for module, _, _ in plain)
    for path, rules in stacked.items():
        module = model.get_submodule(path)
        _swap_class(module, _sparse_class(type(module), SparseExperts))
        vars(module).update(acttail_rules=dict(rules), acttail_name=path, acttail_state=state)
    if policy.name != "all":
        state.handle = entry_hook(state, model)
    vars(model)["acttail_state"] = state
    _note_in_config(model, state)
    return model


def _rule_of(plan: SparsityPlan, weights: LoadedWeights, projection: Projection) -> Rule:
    entry = plan.projections[projection.name]
    match plan.rule:
        case "wina" if entry.k < entry.d_in:
            norms = weights.weight(projection).float().norm(dim=0)  # [d_in]
            return ScaledTopK(entry.k, norms)
        case "threshold" if entry.threshold is not None:
            return Threshold(entry.threshold)
        case "top-p" if entry.p is not None:
            return TopP(entry.p)
    return TopK(entry.k)


def _lay_out(modules: Iterable[nn.Module], *, back: bool = False) -> None:
    """Change the memory layout of linear weights to input-major, or back; values stay."""
    for module in modules:
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or not isinstance(weight, nn.Parameter):
            continue
        if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16):
            old = weight.data
            weight.data = old.contiguous() if back else to_input_major(old)


def _tap_gates(
    model: nn.Module, plan: SparsityPlan, weights: LoadedWeights, state: SparseState
) -> dict[str, Rule]:
    """Rules of `up` and `down` under CATS; each MLP's gate gets a hook that both look at."""
    rules: dict[str, Rule] = {}
    for gate, up, down in gated_mlps(weights.projections):
        threshold = plan.projections[down.name].threshold
        if threshold is None:
            continue
        mlp = model.get_submodule(gate.module.rpartition(".")[0])
        tap = GateTap(activation_of(mlp), threshold)
        state.taps.append(model.get_submodule(gate.module).register_forward_hook(tap))
        rules |= {up.name: GateThreshold(tap, True), down.name: GateThreshold(tap, False)}
    return rules


def activation_of(mlp: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation of a gated MLP of transformers.

    Raises:
        ModelError: it is not where transformers keeps it.
    """
    for name in ("act_fn", "activation_fn"):
        found = getattr(mlp, name, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    raise ModelError(f"cannot tell the activation of {type(mlp).__name__}")


def _check_experts(path: str, module: nn.Module) -> None:
    parameters = list(inspect.signature(module.forward).parameters)
    # The decorator of transformers wraps forward; its own fields tell the supported form.
    if not hasattr(module, "has_gate") and parameters[:3] != [
        "hidden_states", "top_k_index", "top_k_weights",
    ]:  # fmt: skip
        raise ModelError(
            f"the experts {path} ({type(module).__name__}) are of a form acttail cannot run"
        )


def _note_in_config(model: nn.Module, state: SparseState) -> None:
    """Let save_pretrained write the plan, unless another quantizer holds the model's one slot."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    from acttail.transformers import ActTailConfig

    existing = getattr(model.config, "quantization_config", None)
    if existing is None or isinstance(existing, ActTailConfig):
        model.config.quantization_config = ActTailConfig(state.plan.to_dict(), str(state.policy))
        state.config_owned = True


def densify_(model: Model) -> Model:
    """Undo :func:`sparsify_`: the model is again what it was, bit for bit.

    Args:
        model: a sparse model; a dense one is returned untouched.
    """
    state = sparse_state(model)
    if state is None:
        return model
    if state.native:
        _lay_out((m for m in model.modules() if isinstance(m, SparseModule)), back=True)
    for module in model.modules():
        if isinstance(module, SparseModule | SparseExperts):
            _swap_class(module, type(module).__bases__[1])
            for key in ("acttail_rule", "acttail_rules", "acttail_name", "acttail_state"):
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


@dataclass(frozen=True)
class RealisedSparsity:
    """What was dropped while counting.

    Attributes:
        projections: name -> share of the input entries dropped, over the tokens it saw. A routed
            expert that saw no token has its plan's value.
        model: cost-weighted mean.
    """

    projections: dict[str, float]
    model: float


class Counter:
    """Result of :func:`counting`; read it after the block."""

    def __init__(self, state: SparseState) -> None:
        self._state = state
        self.counts: dict[str, list[int]] = {name: [0, 0] for name in state.plan.projections}

    def realised(self) -> RealisedSparsity:
        """The realised sparsity of everything that ran so far."""
        planned = self._state.plan.projections
        by_name = {
            name: 1 - kept / seen if seen else planned[name].realised_sparsity
            for name, (kept, seen) in self.counts.items()
        }
        costs = [planned[name].cost for name in by_name]
        return RealisedSparsity(by_name, model_sparsity(list(by_name.values()), costs))


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter]:
    """Count what each projection drops inside the block; costs nothing outside of one.

    Raises:
        PlanError: the model is dense.
    """
    state = sparse_state(model)
    if state is None:
        raise PlanError("the model is dense: there is no realised sparsity to count")
    counter = Counter(state)
    before, state.counts = state.counts, counter.counts
    try:
        yield counter
    finally:
        state.counts = before
