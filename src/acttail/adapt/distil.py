"""The loss of a sparse model against its own dense self, and its gradients, a few tokens' logits at a time.

Logits are the largest thing there is: 1,024 tokens of a vocabulary of 262,144 are 1.1 GB in float32, and a
divergence takes several of them. So the blocks run once over all tokens, and the head over a few at a time; of the
dense model only the last hidden states are kept, from which its logits are one product away.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from acttail.adapt.parts import Part
from acttail.evaluate.dense_logits import DenseLogits
from acttail.model.weights import input_device
from acttail.sparse.state import SparseState, sparse_state

# Entries of logits that are computed at a time: 64 MB in float32.
_ENTRIES = 1 << 24


class Distillation:
    """One sparse model, its parts under training, and the dense model it was.

    Args:
        model: sparse, in eval mode.
        parts: of :func:`acttail.adapt.parts.attach`, before the first step.
        held: [m, T] token ids that validate; what the dense model makes of them is computed now and held, for it is
            asked for when the parts are merged, too.
        autocast: dtype that products are computed in; None for that of the weights.
        original: inside, the model has what was put into it before its parts as it was.
    """

    def __init__(
        self, model: Any, parts: Sequence[Part], held: torch.Tensor, autocast: torch.dtype | None = None,
        original: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        self._model, self._parts, self._original = model, parts, original
        self._autocast = autocast
        self._device = input_device(model)
        self._decoder = model.get_decoder()
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._kept = DenseLogits()
        self._held = [(ids, self._dense_pass(ids)) for ids in held]

    @property
    def _state(self) -> SparseState:
        """Of the model as it is now: the result is judged under a plan of its own."""
        found = sparse_state(self._model)
        assert found is not None  # noqa: S101  (sparsified by whoever made the parts)
        return found

    def _dense(self, window: int, ids: torch.Tensor) -> torch.Tensor:
        """[T, d] last hidden states of the dense model, computed once per window and kept on disk.

        Args:
            window: its number.
            ids: [T] token ids.
        """
        return self._kept.get(window, functools.partial(self._dense_pass, ids))

    def _dense_pass(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), _every_row_dense(self._state), ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.before())
            stack.enter_context(self._original())
            hidden: torch.Tensor = self._hidden(ids[None])[0]
            return hidden

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] ids -> [B, T, d] as the head sees them."""
        with self._computing():
            found = self._decoder(input_ids=ids.to(self._device), use_cache=False)
        self._output = type(found)
        hidden: torch.Tensor = found.last_hidden_state
        return hidden

    @contextmanager
    def _computing(self) -> Iterator[None]:
        if self._autocast is None:
            yield
            return
        with torch.autocast(self._device.type, dtype=self._autocast):
            yield

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, d] -> [n, vocabulary] float32: the model's own head, with all it does to logits.

        The decoder is kept from running, and hands on what it is given.
        """
        decoder, output = self._decoder, self._output
        before = vars(decoder).get("forward")
        vars(decoder)["forward"] = lambda *_, **__: output(last_hidden_state=hidden[None])
        try:
            with self._computing():
                ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
                logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
                return logits.float()
        finally:
            del vars(decoder)["forward"]
            if before is not None:
                vars(decoder)["forward"] = before

    def _divergence(
        self, dense: torch.Tensor, sparse: torch.Tensor, tokens: int | None
    ) -> tuple[float, torch.Tensor]:
        """(sum over tokens of KL(dense || sparse) in nats, its gradient with respect to `sparse` over `tokens`).

        The gradient with respect to the sparse logits is q - p, so no graph of the divergence is needed.

        Args:
            dense: [n, d] hidden states of the dense model.
            sparse: [n, d] those of the sparse one.
            tokens: what the gradient is divided by; None for no gradient, parameters of the head included.
        """
        rows = max(_ENTRIES // self._vocabulary, 1)
        total = 0.0
        gradient = torch.zeros_like(sparse, dtype=torch.float32)
        for i in range(0, len(sparse), rows):
            with torch.no_grad(), _every_row_dense(self._state):
                p = torch.log_softmax(self._logits(dense[i : i + rows].to(sparse.device)), -1)
            leaf = sparse[i : i + rows].detach().requires_grad_(tokens is not None)
            with torch.set_grad_enabled(tokens is not None):
                logits = self._logits(leaf)
            q = torch.log_softmax(logits.detach(), -1)
            probability = p.exp()
            total += float((probability * (p - q)).sum(dtype=torch.float64))
            if tokens is not None:
                torch.autograd.backward([logits], [(q.exp_() - probability) / tokens])
                assert leaf.grad is not None  # noqa: S101
                gradient[i : i + rows] = leaf.grad
        return total, gradient

    def step(self, numbers: Sequence[int], ids: torch.Tensor) -> float:
        """Add the gradients of the mean KL over some windows to the parameters under training.

        Args:
            numbers: of the windows.
            ids: [B, T] their token ids.

        Returns:
            The mean KL per token, nats.
        """
        dense = torch.cat(
            [self._dense(n, w).to(self._device) for n, w in zip(numbers, ids, strict=True)]
        )
        with torch.enable_grad():
            hidden = self._hidden(ids).flatten(0, 1)
        total, gradient = self._divergence(dense, hidden, ids.numel())
        torch.autograd.backward([hidden], [gradient.to(hidden.dtype)])
        return total / ids.numel()

    def validate(self) -> float:
        """Mean KL per token over the windows that are held out, nats."""
        total, tokens = 0.0, 0
        with torch.no_grad():
            for ids, dense in self._held:
                total += self._divergence(dense, self._hidden(ids[None])[0], None)[0]
                tokens += len(ids)
        return total / tokens


@contextmanager
def _every_row_dense(state: SparseState) -> Iterator[None]:
    """Inside, no projection drops anything."""
    rows, state.rows = state.rows, False
    try:
        yield
    finally:
        state.rows = rows
