"""Critical sparsity: how sparse a part of the model may be and still keep its score.

The measurements of *Universal Properties of Activation Sparsity in Modern LLMs* (arXiv 2509.00454): the
largest sparsity that keeps a share (99 %) of the dense score, found by bisection, for the whole model,
for each kind of projection, and for each vector of the feed-forward network (its input, gate, up and
intermediate), with TopK or top-p as the rule.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from acttail.base.progress import Progress
from acttail.calibrate.probe import probing
from acttail.calibrate.text import Text
from acttail.errors import ActTailError
from acttail.evaluate.perplexity import perplexity
from acttail.model.projections import Projection
from acttail.model.weights import LoadedWeights
from acttail.sparse.rules import RULES as KINDS
from acttail.sparse.rules import Rule

VECTORS = ("input", "gate", "up", "intermediate")
# Those that one number makes, without a plan.
RULES = {name: kind.at_level for name, kind in KINDS.items() if kind.at_level is not None}
_HIGHEST = 0.99


@dataclass(frozen=True)
class Critical:
    """One measurement.

    Attributes:
        kind: ``model``, a kind of projection, or ``ffn`` for a vector.
        vector: ``input``, ``gate``, ``up`` or ``intermediate``; None outside the FFN's vectors.
        sparsity: largest sparsity found that keeps the score, within `tolerance`; under top-p the
            share of entries dropped on average.
        score: the score there.
        dense_score: the dense model's score.
        rule: ``topk`` or ``top-p``.
        p: the share of the L1 norm kept, for top-p.
    """

    kind: str
    vector: str | None
    sparsity: float
    score: float
    dense_score: float
    rule: str
    p: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


class _Dropper:
    """Applies a rule at one level and counts what it drops."""

    def __init__(self, at_level: Callable[[float, int], Rule], level: float) -> None:
        self.at_level, self.level = at_level, level
        self.dropped = self.seen = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rule = self.at_level(self.level, x.shape[-1])
        self.dropped += x.numel() - int(rule.kept(x).sum())
        self.seen += x.numel()
        return rule(x)


def _ffn_parts(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, nn.Module | None]]:
    """(module whose output is the activated gate, up, fused gate_up) of every gated FFN."""
    for module in model.modules():
        activation = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        if not isinstance(activation, nn.Module):
            continue
        if hasattr(module, "gate_proj") and hasattr(module, "up_proj"):
            yield activation, module.get_submodule("up_proj"), None
        elif hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Module):
            yield activation, module.gate_up_proj, module.gate_up_proj


@contextmanager
def _dropping(model: Any, kind: str, vector: str | None, dropper: _Dropper) -> Iterator[None]:
    """Make one part of the model sparse for the length of the block."""
    by_name = {p.name: p for p in LoadedWeights(model).projections}
    wanted: dict[str | None, Callable[[Projection], bool]] = {
        None: lambda p: kind in ("model", p.kind),
        "input": lambda p: p.kind in ("gate", "up", "gate_up", "fc1"),
        "intermediate": lambda p: p.kind in ("down", "fc2"),
    }
    with ExitStack() as stack:
        if vector in wanted:
            chosen = {n for n, p in by_name.items() if wanted[vector](p)}
            stack.enter_context(probing(model, lambda name, x: dropper(x) if name in chosen else x))
        else:
            # Each activation module may be shared by all blocks: hooked once.
            hooked: set[int] = set()
            for activation, up, fused in _ffn_parts(model):
                target = activation if vector == "gate" else up
                if id(target) in hooked:
                    continue
                hooked.add(id(target))
                hook = (
                    _half_hook(dropper) if vector == "up" and fused is not None else _hook(dropper)
                )
                stack.callback(target.register_forward_hook(hook).remove)
            if not hooked:
                raise ActTailError(
                    f"this model has no gated FFN whose {vector} could be made sparse"
                )
        yield


def _hook(dropper: _Dropper) -> Callable[..., torch.Tensor]:
    return lambda module, args, output: dropper(output)


def _half_hook(dropper: _Dropper) -> Callable[..., torch.Tensor]:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        gate, up = torch.chunk(output, 2, dim=-1)
        return torch.cat([gate, dropper(up)], dim=-1)

    return hook


def check_request(keep: float, rule: str) -> None:
    """Refuse what makes no sense.

    Raises:
        ActTailError: `keep` is no share, or there is no such rule.
    """
    if not 0 < keep <= 1:
        raise ActTailError(f"--keep is the share of the dense score to keep, in (0, 1], got {keep}")
    if rule not in RULES:
        raise ActTailError(f"unknown rule {rule!r}: use {' or '.join(RULES)}")


def critical(
    model: Any,
    tokenizer: Any,
    text: Text,
    *,
    keep: float = 0.99,
    rule: str = "topk",
    tokens: int | None = 4096,
    window: int = 1024,
    tolerance: float = 0.01,
    parts: Sequence[tuple[str, str | None]] | None = None,
    progress: Progress | None = None,
) -> list[Critical]:
    """Find the critical sparsity of the model and its parts.

    The score is the inverse perplexity, exp(-NLL): the geometric mean of the probability given to the
    right token.

    Args:
        model: a dense causal LM; dense again afterwards.
        tokenizer: its tokenizer.
        text: text to score.
        keep: share of the dense score to keep, in (0, 1].
        rule: ``topk`` or ``top-p``.
        tokens: how many tokens of the text to use.
        window: tokens per window.
        tolerance: width of the last bracket of the bisection.
        parts: (kind, vector) pairs; by default the model, every kind, and the FFN's vectors.
        progress: called with (parts done, parts).

    Returns:
        One measurement per part.

    Raises:
        ActTailError: `keep` or `rule` make no sense, or the model has no such part.
        TextError: the text is too short.
    """
    check_request(keep, rule)

    by_share = KINDS[rule].needs == "p"

    def score() -> float:
        result = perplexity(model, tokenizer, text, tokens=tokens, window=window)
        return 1 / result.perplexity if result.perplexity > 0 else 0.0

    dense = score()
    if parts is None:
        kinds = list(dict.fromkeys(p.kind for p in LoadedWeights(model).projections))
        gated = any(True for _ in _ffn_parts(model))
        vectors = VECTORS if gated else ("input", "intermediate")
        parts = [("model", None), *((k, None) for k in kinds), *(("ffn", v) for v in vectors)]
    found = []
    for done, (kind, vector) in enumerate(parts, 1):
        low, high = 0.0, _HIGHEST
        share = 1.0 if by_share else None
        best = Critical(kind, vector, 0.0, dense, dense, rule, share)
        while high - low > tolerance:
            level = 0.5 * (low + high)
            dropper = _Dropper(RULES[rule], level)
            with _dropping(model, kind, vector, dropper):
                reached = score()
            if reached >= keep * dense:
                low = level
                realised = dropper.dropped / max(dropper.seen, 1)
                share = 1 - level if by_share else None
                best = Critical(kind, vector, round(realised, 4), reached, dense, rule, share)
            else:
                high = level
        found.append(best)
        if progress is not None:
            progress(done, len(parts))
    return found
