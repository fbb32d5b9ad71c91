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

from acttail.checkpoint import LoadedWeights
from acttail.errors import TextError
from acttail.models import input_device
from acttail.plan import build_plan, sketch
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

    def forward(self, batches: torch.Tensor) -> None:
        """Run the model over the text, for what hooks and probes see of it.

        Args:
            batches: of :meth:`batches`.
        """
        batches = batches.to(input_device(self.model))
        with torch.inference_mode():
            for index, ids in enumerate(batches):
                self.model(input_ids=ids[None], use_cache=False)
                if self.progress is not None:
                    self.progress(index + 1, len(batches))

    def key(self, *parts: object) -> str:
        """Hash that names a result computed from this model, text and `parts`."""
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


@contextmanager
def probing(model: Any, probe: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let `probe` see the input of every projection, experts included, and replace it.

    The model is dense before and after.
    """
    source_state = sparse_state(model)
    if source_state is None:
        weights = LoadedWeights(model)
        everything = dict.fromkeys((p.name for p in weights.projections), 0.0)
        plan = build_plan(weights, everything, sparsity=0.0, allocator="uniform", arguments={})
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


class BlockTape:
    """Hooks on the blocks that remember their calls and cut the graph at the last block's output.

    Use it as a context around one forward pass; afterwards :meth:`replay` runs any block again.
    """

    def __init__(self, model: Any) -> None:
        self.stack_path, self.blocks = decoder_blocks(model)
        self.calls: list[_Call | None] = [None] * len(self.blocks)
        self.last: torch.Tensor | None = None
        self.tuples = False

    def __enter__(self) -> "BlockTape":
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
        self.tuples = isinstance(output, tuple)
        hidden = output[0] if isinstance(output, tuple) else output
        self.last = hidden.detach().requires_grad_()
        torch.set_grad_enabled(
            True
        )  # the head runs with gradients; the caller's mode comes back after
        return (self.last, *output[1:]) if isinstance(output, tuple) else self.last

    @contextmanager
    def starting_at(self, index: int) -> Iterator[None]:
        """Inside, the model's forward pass begins at block `index`, from its remembered input.

        The blocks before it hand on what they are given; for passes that differ from that block on.
        """
        call = self.calls[index]
        assert call is not None  # noqa: S101

        def skip(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if self.tuples else hidden

        def restart(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (call.hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": call.hidden}

        handle = self.blocks[index].register_forward_pre_hook(restart, with_kwargs=True)
        skipped = list(self.blocks)[:index]
        for block in skipped:
            vars(block)["forward"] = skip
        try:
            yield
        finally:
            handle.remove()
            for block in skipped:
                del vars(block)["forward"]

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
) -> float:
    """Run one batch forward and back, showing each block's projections to `visit`, last block first.

    Args:
        model: a causal LM, dense; its parameters get no gradients.
        ids: [batch, tokens].
        objective: logits [batch, tokens, vocabulary] -> (value, gradient with respect to them).
        visit: is shown (block, {projection: (x, Wᵀg)}) with x and Wᵀg [rows, d_in]; g is the gradient
            of the objective with respect to the projection's output.

    Returns:
        The objective's value.
    """
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    taping = False

    def probe(name: str, x: torch.Tensor) -> torch.Tensor:
        if not taping:
            return x
        # A leaf-like view of its own for each projection: its gradient is Wᵀg of that one alone.
        own = x.view_as(x)
        if own.requires_grad:
            own.retain_grad()
        seen[name] = (x.detach(), own)
        return own

    tape = BlockTape(model)
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
                torch.autograd.backward(output, gradient)
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
        flat, flat_upstream = logits.flatten(0, -2), upstream.flatten(0, -2)
        for i in range(0, flat.shape[0], 256):
            row, out = flat[i : i + 256], flat_upstream[i : i + 256]
            p = torch.softmax(row.float(), dim=-1)
            # By the inverse of the distribution function: torch.multinomial takes ten times as long.
            draw = torch.rand(len(p), 1, generator=generator, device=p.device)
            sampled = torch.searchsorted(p.cumsum(-1), draw).clamp_(max=p.shape[-1] - 1)
            total += float(p.gather(-1, sampled).log().sum())
            # d log p(y) / d logits = onehot(y) - p
            out.copy_(p.neg_().scatter_add_(-1, sampled, torch.ones_like(p[:, :1])))
        return total, upstream

    return objective
