"""Stream text through a model block by block, with gradients and little memory.

A pass keeps one hidden state per block; the backward pass runs each block again with gradients and
forgets it. What visits are shown are a projection's input x and Wᵀg, the gradient with respect to
that projection's input alone. It knows nothing of curves, budgets or plans.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from acttail.allocate.base import AllocationContext
from acttail.errors import TextError
from acttail.plan import SparsityPlan
from acttail.projections import decoder_blocks
from acttail.sparsify import densify_, sparse_state, sparsify_
from acttail.text import Text, bos_of, tokenize, windows

Progress = Callable[[int, int], None]
# (block, {projection: (x, Wᵀg)}), both [rows, d_in].
Visit = Callable[[int, dict[str, tuple[torch.Tensor, torch.Tensor]]], None]


# logits [batch, tokens, vocabulary] -> (value, gradient of the value with respect to the logits).
Objective = Callable[[torch.Tensor], tuple[float, torch.Tensor]]


@dataclass
class Calibration:
    """The model and the text that a calibrated allocator may see.

    Attributes:
        model: a causal LM, dense.
        tokenizer: its tokenizer.
        text: calibration text; never the text that is scored.
        tokens: how many of its tokens are used.
        window: tokens per window.
        seed: of everything random.
        progress: called with (done, total).
    """

    model: Any
    tokenizer: Any
    text: Text
    tokens: int = 4096
    window: int = 1024
    seed: int = 0
    progress: Progress | None = None
    results: dict[str, Any] = field(default_factory=dict)

    def batches(self) -> torch.Tensor:
        """[windows, window] token ids.

        Raises:
            TextError: the text is shorter than one window.
        """
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", self.window)
        window = min(self.window, limit, self.tokens)
        ids = tokenize(self.text, self.tokenizer)
        bos = bos_of(self.tokenizer)
        if 2 <= ids.numel() < window:
            window = ids.numel()
        if ids.numel() < 2:
            raise TextError(f"the calibration text {self.text.name} has fewer than 2 tokens")
        return windows(ids, window, self.tokens, None, bos, self.text.name)

    def key(self, *parts: object) -> str:
        """Hash that names a result computed from this model, text and `parts`."""
        from acttail.checkpoint import LoadedWeights
        from acttail.plan import sketch

        weights = LoadedWeights(self.model)
        sketches = [(p.name, *sketch(weights.weight(p))) for p in weights.projections]
        described = (
            sketches,
            self.text.name,
            self.tokens,
            self.window,
            self.seed,
            self.model.dtype,
            *parts,
        )
        return hashlib.sha256(repr(described).encode()).hexdigest()[:32]


def calibration_of(context: AllocationContext) -> Calibration:
    """The context's calibration.

    Raises:
        TextError: there is none.
    """
    if not isinstance(context.calibration, Calibration):
        raise TextError("this allocator is calibrated: give --calibration-text (or 'self')")
    return context.calibration


@contextmanager
def probing(model: Any, probe: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let `probe` see the input of every projection, experts included, and replace it.

    The model is dense before and after.
    """
    from acttail.allocate.registry import make_plan

    source_state = sparse_state(model)
    if source_state is None:
        sparsify_(model, make_plan(model, 0.0, allocator="uniform"), check_contents=False)
    state = sparse_state(model)
    assert state is not None  # noqa: S101
    before, state.probe = state.probe, probe
    try:
        yield
    finally:
        state.probe = before
        if source_state is None:
            densify_(model)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No parameter asks for a gradient inside the block."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(requires_grad=False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(requires_grad=True)


@dataclass
class _Call:
    """What the model called a block with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: torch.Tensor


class _Tape:
    """Hooks on the blocks that remember their calls and cut the graph at the last block's output."""

    def __init__(self, model: Any) -> None:
        self.stack_path, self.blocks = decoder_blocks(model)
        self.calls: list[_Call | None] = [None] * len(self.blocks)
        self.last: torch.Tensor | None = None

    def __enter__(self) -> "_Tape":
        self._handles = [
            block.register_forward_pre_hook(self._remember(i), with_kwargs=True)
            for i, block in enumerate(self.blocks)
        ]
        self._handles.append(self.blocks[-1].register_forward_hook(self._cut))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _remember(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.calls[index] = _Call(args, kwargs, hidden.detach())

        return hook

    def _cut(self, module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        self.last = hidden.detach().requires_grad_()
        torch.set_grad_enabled(
            True
        )  # the head runs with gradients; the caller's mode comes back after
        return (self.last, *output[1:]) if isinstance(output, tuple) else self.last

    def replay(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run block `index` again from its remembered input: (input leaf, output)."""
        call = self.calls[index]
        assert call is not None  # noqa: S101
        leaf = call.hidden.detach().requires_grad_()
        kwargs = dict(call.kwargs)
        if call.args:
            args = (leaf, *call.args[1:])
        else:
            args, kwargs["hidden_states"] = (), leaf
        output = self.blocks[index](*args, **kwargs)
        return leaf, output[0] if isinstance(output, tuple) else output


def backward_by_block(
    model: Any,
    ids: torch.Tensor,
    objective: Objective,
    visit: Visit,
    select: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> float:
    """Run one batch forward and back, showing each block's projections to `visit`, last block first.

    Args:
        model: a causal LM, dense; its parameters get no gradients.
        ids: [batch, tokens].
        objective: logits [batch, tokens, vocabulary] -> (value, gradient with respect to them).
        visit: is shown (block, {projection: (x, Wᵀg)}) with x and Wᵀg [rows, d_in]; g is the gradient
            of the objective with respect to the projection's output.
        select: what each projection is given instead of its input; gradients pass through it, and x
            is what went into it.

    Returns:
        The objective's value.
    """
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    taping = False

    def probe(name: str, x: torch.Tensor) -> torch.Tensor:
        if not taping:
            return x if select is None else select(name, x)
        # A leaf-like view of its own for each projection: its gradient is Wᵀg of that one alone.
        own = x.view_as(x) if select is None else select(name, x)
        if own.requires_grad:
            own.retain_grad()
        seen[name] = (x.detach(), own)
        return own

    tape = _Tape(model)
    with frozen(model), probing(model, probe):
        with tape, torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        assert tape.last is not None  # noqa: S101
        value, upstream = objective(logits.detach())
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(logits, tape.last, upstream)
        del logits, upstream
        taping = True
        for index in reversed(range(len(tape.blocks))):
            seen.clear()
            with torch.enable_grad():
                leaf, output = tape.replay(index)
                output.backward(gradient)
            assert leaf.grad is not None  # noqa: S101
            gradient = leaf.grad
            flat = {
                name: (x.reshape(-1, x.shape[-1]), own.grad.reshape(-1, x.shape[-1]))
                for name, (x, own) in seen.items()
                if own.grad is not None
            }
            visit(index, flat)
            tape.calls[index] = None
    return value


def fisher_objective(generator: torch.Generator) -> Objective:
    """Sum over all positions of log p(y_t), with y_t sampled from the model itself.

    The squared gradient of this, in expectation over y, is the Fisher information: the curvature of
    the KL divergence to the unchanged model.
    """

    def objective(logits: torch.Tensor) -> tuple[float, torch.Tensor]:
        upstream = torch.empty_like(logits)
        total = 0.0
        # By rows, so that the float32 copy of a large vocabulary stays small.
        for row, out in zip(
            logits.flatten(0, -2).split(256), torch.split(upstream.flatten(0, -2), 256), strict=True
        ):
            p = torch.softmax(row.float(), dim=-1)
            sampled = torch.multinomial(p, 1, generator=generator)
            total += float(p.gather(-1, sampled).log().sum())
            # d log p(y) / d logits = onehot(y) - p
            out.copy_(p.neg_().scatter_add_(-1, sampled, torch.ones_like(p[:, :1])))
        return total, upstream

    return objective


def with_plan(plan: SparsityPlan) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """A `select` that applies a plan's TopK, with gradients passing through what is kept."""
    from acttail.ops import topk_mask

    ks = {name: entry.k for name, entry in plan.projections.items()}
    return lambda name, x: topk_mask(x, ks[name])
