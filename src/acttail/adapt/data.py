"""The windows of token ids that a model is adapted on, those that validate it, and in what order they come."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from acttail.adapt.settings import Settings
from acttail.base.files import cache_dir, write_text
from acttail.base.progress import Progress
from acttail.calibrate.selftext import sample_text
from acttail.calibrate.text import Text, bos_of, tokenize, windows
from acttail.errors import ActTailError, TextError
from acttail.plan import sketch
from acttail.sparse.apply import densify_

# Of a short text at most this share validates.
_MOST_HELD = 0.2
_SAMPLED = 32768


@dataclass(frozen=True)
class Windows:
    """Windows of one run.

    Attributes:
        train: [n, window] token ids.
        held: [m, window] token ids that are never trained on.
        names: of the texts they are from.
    """

    train: torch.Tensor
    held: torch.Tensor
    names: tuple[str, ...]

    def step(self, step: int, settings: Settings) -> list[int]:
        """Which windows a step trains on, as indices of :attr:`train`: every window once, then again anew.

        A function of the step alone, so that a run that goes on has the order of one that never stopped.
        """
        first = step * settings.batch
        return [self._order(first + i, settings.seed) for i in range(settings.batch)]

    def _order(self, position: int, seed: int) -> int:
        epoch, place = divmod(position, len(self.train))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return int(torch.randperm(len(self.train), generator=generator)[place])

    def digest(self) -> str:
        """Hash of every id."""
        found = hashlib.sha256()
        for ids in (self.train, self.held):
            found.update(f"{tuple(ids.shape)}".encode())
            found.update(ids.contiguous().numpy().tobytes())
        return found.hexdigest()


def sampled(
    model: Any, tokenizer: Any, *, tokens: int | None, seed: int, progress: Progress | None = None
) -> Text:
    """Text sampled from the model, kept in the cache, so that a run that goes on need not sample it again.

    Args:
        model: a causal LM; made dense.
        tokenizer: its tokenizer.
        tokens: about how many tokens; None for 32,768.
        seed: of the sampling.
        progress: called with (tokens per sequence done, in all).

    Raises:
        TextError: the tokenizer has no token to start from.
    """
    densify_(model)
    tokens = tokens or _SAMPLED
    path = cache_dir() / "adapt" / f"self-{sketched(model, tokens, seed)}.txt"
    with suppress(OSError, ValueError):  # no such file, or a damaged one
        # As bytes: a model writes line ends of every kind, and they are to stay what they were.
        return _own(path.read_bytes().decode())
    text = sample_text(model, tokenizer, tokens=tokens, seed=seed, progress=progress)
    with suppress(OSError, ActTailError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text.content)
    return text


def _own(content: str) -> Text:
    return Text(f"self@{hashlib.sha256(content.encode()).hexdigest()[:12]}", content)


def sketched(model: Any, *parts: object) -> str:
    """Hash that names a model by all its parameters, and whatever else is given."""
    # Not the projections alone: an adapted model may differ in its norms only.
    sketches = [
        (name, *sketch(p.detach().reshape(len(p), -1) if p.dim() > 1 else p.detach()[None]))
        for name, p in model.named_parameters()
    ]
    return hashlib.sha256(repr((sketches, *parts)).encode()).hexdigest()[:32]


def cut(
    texts: Sequence[Text], model: Any, tokenizer: Any, settings: Settings, tokens: int | None
) -> Windows:
    """Cut texts into windows and hold some of each out.

    Held-out windows lie evenly spread over a text, so that each kind of text that is trained on is validated.

    Args:
        texts: one or more; never what is scored.
        model: a causal LM.
        tokenizer: its tokenizer.
        settings: window length, tokens to hold out.
        tokens: of each text to use, from its start; None for all.

    Raises:
        TextError: a text has too few tokens for one window to train on and one to hold out, or the
            tokenizer does not belong to the model.
    """
    bos = bos_of(tokenizer)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", settings.window)
    window = min(settings.window, limit)
    cuts = [windows(tokenize(t, tokenizer), window, tokens, None, bos, t.name) for t in texts]
    count = sum(map(len, cuts))
    wanted = max(settings.held_out // window, 1) / count
    share = min(wanted, _MOST_HELD)
    train, held = [], []
    for text, found in zip(texts, cuts, strict=True):
        n = max(round(share * len(found)), 1)
        if len(found) < 2:
            raise TextError(
                f"the text {text.name} has one window of {window} tokens: adapting needs one to train on and "
                "one to validate; give a longer text or a smaller --window"
            )
        chosen = torch.zeros(len(found), dtype=torch.bool)
        chosen[[(2 * i + 1) * len(found) // (2 * n) for i in range(n)]] = True
        held.append(found[chosen])
        train.append(found[~chosen])
    made = Windows(torch.cat(train), torch.cat(held), tuple(t.name for t in texts))
    known = model.get_input_embeddings().num_embeddings
    if int(max(made.train.max(), made.held.max())) >= known:
        raise TextError(
            f"the tokenizer gives ids beyond the model's {known} embeddings; they do not match"
        )
    return made
