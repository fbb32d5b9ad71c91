"""What neighbouring tokens share of a sparse model's weights: aggregated sparsity, and reuse of what was loaded.

After *ReLU Strikes Back* (arXiv 2310.04564, §5). Both follow one vector of a projection from token to token, over
prompts in transformers; nothing is timed, and no kernel keeps rows between tokens. Reuse is simulated exactly: what a
token may use depends on its own projection's inputs at earlier tokens alone, and one pass over a text has those.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from acttail.base.progress import Progress
from acttail.calibrate.probe import probing
from acttail.calibrate.text import Text, bos_of, tokenize, windows
from acttail.errors import ActTailError
from acttail.maths.budget import model_sparsity
from acttail.maths.losses import divergence
from acttail.model.projections import Projection
from acttail.model.weights import LoadedWeights, input_device
from acttail.sparse.rules import Dense, Rule
from acttail.sparse.state import SparseState, sparse_state

# Tokens of a window, each twice the one before.
SPANS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Aggregated:
    """How much of the weights no token of a window reads.

    Attributes:
        kind: of projection, or ``model`` for the mean over all by their cost, those that are dense included.
        tokens: of a window.
        sparsity: share of the inputs that were zero or not kept for every token of a window.
        independent: what that would be if every token dropped its share anew at random.
    """

    kind: str
    tokens: int
    sparsity: float
    independent: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Reuse:
    """What it costs to take turns: so many tokens load what they keep, so many use what those have loaded.

    Shares are of the weights of the projections that are sparse, per token.

    Attributes:
        tokens: of each turn.
        kl: KL(dense || reusing) per token, nats, over the tokens that reuse.
        kl_without: KL(dense || sparse) of the same tokens without reuse; 0 where the plan drops zeros alone.
        read: share that a token reads without reuse, of whatever memory.
        cached: share that a token would load if what the tokens of both turns have read were still there.
        loaded: share that a token loads with reuse: what the loading turn read, over both turns.
        held: share that fast memory must hold for it.
    """

    tokens: int
    kl: float
    kl_without: float
    read: float
    cached: float
    loaded: float
    held: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


class _Rules:
    """The rules of a sparse model's projections."""

    def __init__(self, model: Any) -> None:
        state = sparse_state(model)
        if state is None:
            raise ActTailError(
                "the model is dense: give a plan, or a model that was adapted to one or to ReLU"
            )
        self.state: SparseState = state
        covered = state.plan.covered(LoadedWeights(model))
        routed = next((p for p in covered if p.expert is not None), None)
        if routed is not None:
            raise ActTailError(
                f"{routed.name} is an expert's: which tokens it sees is not known here, so nothing is aggregated"
            )
        self.projections: dict[str, Projection] = {p.name: p for p in covered}
        self.rules: dict[str, Rule] = {
            name: model.get_submodule(p.module).acttail_rule for name, p in self.projections.items()
        }

    def sparse(self, name: str) -> bool:
        """Whether a projection drops anything."""
        return not isinstance(self.rules[name], Dense)

    def mean(self, values: dict[str, float], names: Sequence[str] | None = None) -> float:
        """Over projections by their cost; those without a value count as 0."""
        chosen = list(self.projections) if names is None else names
        costs = [self.projections[n].cost for n in chosen]
        return model_sparsity([values.get(n, 0.0) for n in chosen], costs)


def check_spans(spans: Sequence[int]) -> None:
    """Refuse turns that are none.

    Raises:
        ActTailError: names the first.
    """
    wrong = next((s for s in spans if s < 1), None)
    if wrong is not None or not spans:
        raise ActTailError(f"a turn has at least one token, not {wrong if spans else 'none'}")


def _batches(
    model: Any, tokenizer: Any, text: Text, tokens: int | None, window: int
) -> torch.Tensor:
    """[n, window] token ids."""
    found = windows(tokenize(text, tokenizer), window, tokens, None, bos_of(tokenizer), text.name)
    return found.to(input_device(model))


def aggregated(
    model: Any, tokenizer: Any, text: Text, *, tokens: int | None = 4096, window: int = 1024,
    progress: Progress | None = None,
) -> list[Aggregated]:  # fmt: skip
    """Measure aggregated sparsity over windows of 1, 2, 4 ... 128 tokens.

    Args:
        model: sparse, without routed experts.
        tokenizer: its tokenizer.
        text: that it reads.
        tokens: of the text to use.
        window: tokens that it reads at a time; longer spans than fit are left out.
        progress: called with (windows done, windows).

    Returns:
        For the model and each kind of projection that is sparse, one measurement per span.

    Raises:
        ActTailError: the model is dense or has experts.
        TextError: the text is too short.
    """
    rules = _Rules(model)
    spans = [s for s in SPANS if s <= window]
    unused = {name: dict.fromkeys(spans, 0.0) for name in rules.rules if rules.sparse(name)}
    batches = _batches(model, tokenizer, text, tokens, window)

    def probe(name: str, x: torch.Tensor) -> torch.Tensor:
        y = rules.rules[name](x)
        if name in unused:
            used = (y != 0).flatten(0, -2)  # [T, d]
            for span in spans:
                if span > 1:
                    even = len(used) // 2 * 2
                    used = used[0:even:2] | used[1:even:2]
                unused[name][span] += 1 - float(used.float().mean())
        return y

    with probing(model, probe), torch.no_grad():
        for done, ids in enumerate(batches, 1):
            model.get_decoder()(input_ids=ids[None], use_cache=False)
            if progress is not None:
                progress(done, len(batches))
    shares = {n: {s: v / len(batches) for s, v in by.items()} for n, by in unused.items()}
    kinds: dict[str, list[str]] = {"model": list(rules.projections)}
    for name in shares:
        kinds.setdefault(rules.projections[name].kind, []).append(name)
    return [
        Aggregated(
            kind, span,
            round(rules.mean({n: by[span] for n, by in shares.items()}, names), 5),
            round(rules.mean({n: by[1] ** span for n, by in shares.items()}, names), 5),
        )
        for kind, names in kinds.items() for span in spans
    ]  # fmt: skip


class _Turns:
    """Sees each projection's input; in every second turn lets through what the turn before it has loaded."""

    def __init__(self, rules: _Rules, span: int, *, reusing: bool) -> None:
        self._rules, self._span, self._reusing = rules, span, reusing
        self.read: dict[str, float] = {}
        self.cached: dict[str, float] = {}
        self.held: dict[str, float] = {}

    def __call__(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """[1, T, d], T a multiple of both turns -> what the projection is given."""
        y = self._rules.rules[name](x)
        if not self._rules.sparse(name):
            return y
        d = x.shape[-1]
        own = y.reshape(-1, 2, self._span, d)
        used = own != 0
        loaded = used[:, 0].any(1)  # [cycles, d]
        if not self._reusing:
            self._add(self.read, name, used.float().mean())
            self._add(
                self.cached, name, used.flatten(1, 2).any(1).float().mean() / (2 * self._span)
            )
            return y
        self._add(self.held, name, loaded.float().mean())
        out = own.clone()
        whole = x.reshape(-1, 2, self._span, d)[:, 1]
        out[:, 1] = torch.where(
            loaded[:, None], whole, torch.zeros((), dtype=x.dtype, device=x.device)
        )
        return out.reshape(x.shape)

    @staticmethod
    def _add(to: dict[str, float], name: str, value: torch.Tensor) -> None:
        to[name] = to.get(name, 0.0) + float(value)


def reuse(
    model: Any, tokenizer: Any, text: Text, spans: Sequence[int], *, tokens: int | None = 4096, window: int = 1024,
    progress: Progress | None = None,
) -> list[Reuse]:  # fmt: skip
    """Measure what turns of loading and reusing cost in KL, and how many rows they save.

    A reusing token's projections see those inputs whose rows the loading turn has read, and no others: under TopK, all
    of them, not its own k among them.

    Args:
        model: sparse, without routed experts.
        tokenizer: its tokenizer.
        text: that it reads.
        spans: tokens of each turn.
        tokens: of the text to use.
        window: tokens that it reads at a time; what does not fill both turns at its end is dropped.
        progress: called with (windows done, windows) over all spans.

    Returns:
        One measurement per span.

    Raises:
        ActTailError: the model is dense or has experts, or a span does not fit a window.
        TextError: the text is too short.
    """
    check_spans(spans)
    rules = _Rules(model)
    largest = max(spans)
    if 2 * largest > window:
        raise ActTailError(f"turns of {largest} tokens do not fit twice into windows of {window}")
    batches = _batches(model, tokenizer, text, tokens, window)
    names = [n for n in rules.rules if rules.sparse(n)]
    found = []
    for i, span in enumerate(spans):
        without, turns = _Turns(rules, span, reusing=False), _Turns(rules, span, reusing=True)
        lost = [0.0, 0.0]
        scored = 0
        length = window // (2 * span) * (2 * span)
        for done, ids in enumerate(batches, 1):
            part = ids[None, :length]
            second = torch.arange(length) % (2 * span) >= span
            with torch.no_grad():
                dense = _dense(model, rules.state, part)[second]
                for at, probe in enumerate((without, turns)):
                    with probing(model, probe):
                        logits = model(input_ids=part, use_cache=False).logits[0][second]
                    lost[at] += float(divergence(dense, logits)[0].sum(dtype=torch.float64))
            scored += int(second.sum())
            if progress is not None:
                progress(i * len(batches) + done, len(spans) * len(batches))

        def mean(values: dict[str, float]) -> float:
            return rules.mean({n: v / len(batches) for n, v in values.items()}, names)

        held = mean(turns.held)
        found.append(Reuse(
            span, lost[1] / scored, max(lost[0] / scored, 0.0), mean(without.read), mean(without.cached),
            held / (2 * span), held,
        ))  # fmt: skip
        if not math.isfinite(found[-1].kl):
            raise ActTailError(
                "the logits are not finite: the model's weights or activations are broken"
            )
    return found


def _dense(model: Any, state: SparseState, ids: torch.Tensor) -> torch.Tensor:
    """[T, vocabulary] of the same model with nothing dropped."""
    rows, state.rows = state.rows, False
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
        return logits
    finally:
        state.rows = rows
