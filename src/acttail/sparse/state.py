"""What all sparse modules of one model share, and the selection they make with it."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from acttail.errors import ActTailError
from acttail.model.hf import cache_among
from acttail.plan import SparsityPlan
from acttail.sparse.policy import PrefillPolicy, past_length
from acttail.sparse.rules import Rule


@dataclass
class SparseState:
    """What all sparse modules of one model share.

    Attributes:
        plan: the plan that was applied.
        policy: which tokens are sparse.
        rows: for the pass under way: True (all), False (none) or [batch, tokens] bool.
        head: name of the output head where it is sparse and the policy tells tokens apart, else None.
        wanted: for the pass under way: of which tokens the head sees the stream, as an index of the second
            dimension of `rows`.
        counts: projection name -> [entries kept, entries seen] while counting, else None.
        probe: while calibrating, sees each projection's input instead of the rule and returns what
            the projection is given; else None.
        handle: the model's hook, for policies that need to see each pass.
        native: whether weights are input-major, so that a few rows read the kept ones alone.
        taps: handles of the hooks that rules look through.
    """

    plan: SparsityPlan
    policy: PrefillPolicy
    rows: torch.Tensor | bool = True
    head: str | None = None
    wanted: slice | torch.Tensor = field(default_factory=lambda: slice(None))
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


def sparse_state(model: nn.Module) -> SparseState | None:
    """The state of a sparse model, None if it is dense."""
    return getattr(model, "acttail_state", None)


def select(
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
    if name == state.head and isinstance(rows, torch.Tensor):
        rows = rows[:, state.wanted]
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


def entry_hook(model: nn.Module) -> Any:
    """Let a policy see each pass: a hook on the model that works out which rows are sparse."""
    return model.register_forward_pre_hook(_before_pass, with_kwargs=True)


def _before_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The hook. It finds the state by the module it is called with, so that a copy has its own."""
    state = sparse_state(module)
    if state is None:
        return
    kind: Any = type(module)
    given = _signature(kind).bind_partial(module, *args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise ActTailError(f"the prefill policy {state.policy} needs input_ids or inputs_embeds")
    wanted = given.get("logits_to_keep")
    last = wanted if isinstance(wanted, int) else 0
    state.wanted = (
        wanted if isinstance(wanted, torch.Tensor) else slice(-last, None) if last else slice(None)
    )
    state.rows = state.policy.sparse_rows(
        tokens.shape[0], tokens.shape[1], past_length(cache_among(given)),
        given.get("attention_mask"), last,
    )  # fmt: skip


@functools.cache
def _signature(cls: Any) -> inspect.Signature:
    return inspect.signature(cls.forward)
