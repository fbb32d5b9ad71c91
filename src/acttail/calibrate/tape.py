"""Stream text through a model block by block, with gradients and little memory.

A pass keeps one hidden state per block; the backward pass runs each block again with gradients and
forgets it. What visits are shown are a projection's input x and Wᵀg, the gradient with respect to
that projection's input alone. It knows nothing of curves, budgets or plans.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from acttail.calibrate.probe import probing
from acttail.model.projections import decoder_blocks, find_head

# (block, {projection: (x, Wᵀg)}), both [rows, d_in].
Visit = Callable[[int, dict[str, tuple[torch.Tensor, torch.Tensor]]], None]


# logits [batch, tokens, vocabulary] -> (value, gradient of the value with respect to the logits).
Objective = Callable[[torch.Tensor], tuple[float, torch.Tensor]]


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

        The blocks before it hand on what they are given; for passes that differ from that block on. An index
        of as many blocks as there are leaves what comes after the last.
        """
        call = self.calls[index] if index < len(self.blocks) else None
        start = self.last if call is None else call.hidden
        assert start is not None  # noqa: S101

        def skip(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if self.tuples else hidden

        def restart(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (start, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": start}

        # Hooks run before a forward that is skipped, too.
        first = self.blocks[min(index, len(self.blocks) - 1)]
        handle = first.register_forward_pre_hook(restart, with_kwargs=True)
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
    """Run one batch forward and back, showing projections to `visit`: the head's, then block by block from the last.

    Args:
        model: a causal LM, dense; its parameters get no gradients.
        ids: [batch, tokens].
        objective: logits [batch, tokens, vocabulary] -> (value, gradient with respect to them).
        visit: is shown (block, {projection: (x, Wᵀg)}) with x and Wᵀg [rows, d_in]; g is the gradient
            of the objective with respect to the projection's output. The output head's block is the number
            of blocks.

    Returns:
        The objective's value.
    """
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    taping = False
    head = find_head(model)
    names = [] if head is None else [head.name]

    def probe(name: str, x: torch.Tensor) -> torch.Tensor:
        if not taping and name not in names:
            return x
        # A leaf-like view of its own for each projection: its gradient is Wᵀg of that one alone.
        own = x.view_as(x)
        if own.requires_grad:
            own.retain_grad()
        seen[name] = (x.detach(), own)
        return own

    tape = BlockTape(model)
    with frozen(model), probing(model, probe, head=True):
        with tape, torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        assert tape.last is not None  # noqa: S101
        value, upstream = objective(logits.detach())
        inputs = [seen[name] for name in names]
        with torch.enable_grad():
            gradient, *own_gradients = torch.autograd.grad(
                logits, [tape.last, *(own for _, own in inputs)], upstream
            )
        del logits, upstream
        visit(len(tape.blocks), {
            name: (x.reshape(-1, x.shape[-1]), wanted.reshape(-1, x.shape[-1]))
            for name, (x, _), wanted in zip(names, inputs, own_gradients, strict=True)
        })  # fmt: skip
        del inputs, own_gradients
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
