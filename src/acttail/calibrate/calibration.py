"""The model and the text that a calibrated allocator may see."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from acttail.base.progress import Progress
from acttail.calibrate.text import Text, bos_of, tokenize, windows
from acttail.errors import TextError
from acttail.model.weights import LoadedWeights, input_device
from acttail.plan import sketch

if TYPE_CHECKING:
    from acttail.calibrate.elsewhere import Elsewhere

T = TypeVar("T")


@dataclass(frozen=True)
class Calibration:
    """The model and the text that a calibrated allocator may see.

    What was measured is kept with it, by content: a copy made by ``dataclasses.replace`` starts without
    results, and a model whose weights have changed since is measured again.

    Attributes:
        model: a causal LM, dense.
        tokenizer: its tokenizer.
        text: calibration text; never the text that is scored.
        tokens: how many of its tokens are used.
        window: tokens per window.
        seed: of everything random.
        progress: called with (done, total).
        elsewhere: where curves are measured window by window, instead of in this process.
    """

    model: Any
    tokenizer: Any
    text: Text
    tokens: int = 4096
    window: int = 1024
    seed: int = 0
    progress: Progress | None = None
    elsewhere: "Elsewhere | None" = None
    _results: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def batches(self) -> torch.Tensor:
        """[windows, window] token ids.

        Raises:
            TextError: the text is shorter than one window.
        """
        return self._batches

    @cached_property
    def _batches(self) -> torch.Tensor:
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

    def key(self, *parts: object, ids: torch.Tensor | None = None) -> str:
        """Hash that names a result computed from this model's weights, the token ids seen and `parts`.

        Args:
            parts: what else the result depends on.
            ids: the token ids it was computed from; those of :meth:`batches` by default.
        """
        weights = LoadedWeights(self.model)
        # Every parameter, not only the projections: embeddings and norms move results just as well.
        sketches = [
            (name, *sketch(_rows(weights.tensor(name))))
            for name, _ in self.model.named_parameters()
        ]
        seen = (self.batches() if ids is None else ids).cpu().contiguous()
        text = hashlib.sha256(seen.numpy().tobytes()).hexdigest()
        described = (sketches, text, tuple(seen.shape), self.seed, self.model.dtype, *parts)
        return hashlib.sha256(repr(described).encode()).hexdigest()[:32]

    def once(self, make: Callable[[], T], *parts: object) -> T:
        """The result of `make`, computed once for these weights, this text and `parts`.

        Args:
            make: computes it from this calibration.
            parts: its name, and what else it depends on.
        """
        key = self.key(*parts)
        if key not in self._results:
            self._results[key] = make()
        found: T = self._results[key]
        return found


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a matrix, [first dimension, the rest]; a vector is one row."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)
