"""Perplexity with its standard error, and the protocol that makes it comparable."""

import functools
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from acttail.base.dtypes import name_of
from acttail.base.progress import Progress
from acttail.calibrate.text import Text, bos_of, read_text, tokenize, windows
from acttail.errors import ActTailError, TextError
from acttail.evaluate.dense_logits import DenseLogits
from acttail.maths.losses import clustered_mean, divergence, token_losses
from acttail.model.weights import input_device
from acttail.sparse.counting import RealisedSparsity, counting
from acttail.sparse.policy import PrefillPolicy
from acttail.sparse.state import SparseState, entry_hook, sparse_state


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and everything needed to compare it.

    Attributes:
        perplexity: exp(nll).
        perplexity_stderr: standard error by the delta method, clustered by window.
        nll: mean negative log-likelihood per scored token, nats.
        nll_stderr: its standard error, clustered by window; None with a single window.
        tokens: tokens fed, windows x window.
        scored: tokens scored.
        windows: number of windows.
        window: tokens per window.
        stride: ids between the starts of windows.
        bos: whether each window starts with a BOS, because the tokenizer adds one.
        dtype: of the model's weights.
        prefill: the policy.
        text: name and content hash of the text.
        seconds: wall time.
        realised: realised sparsity, None for a dense model.
        token_nll: [windows, window - 1] float32, NaN where a position was not scored.
        kl: mean KL(dense || this model) per scored token, nats; None unless asked for.
        kl_stderr: its standard error, clustered by window.
        top1: share of scored positions whose likeliest token is the dense model's; None unless asked.
        top1_stderr: its standard error, clustered by window.
        token_kl: [windows, window - 1] float32, or None.
    """

    perplexity: float
    perplexity_stderr: float | None
    nll: float
    nll_stderr: float | None
    tokens: int
    scored: int
    windows: int
    window: int
    stride: int
    bos: bool
    dtype: str
    prefill: str
    text: str
    seconds: float
    realised: RealisedSparsity | None
    token_nll: torch.Tensor
    kl: float | None = None
    kl_stderr: float | None = None
    top1: float | None = None
    top1_stderr: float | None = None
    token_kl: torch.Tensor | None = None


METRICS = ("perplexity", "kl", "top1")


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuse a metric that there is not.

    Raises:
        ActTailError: names it.
    """
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise ActTailError(f"unknown metric {unknown[0]!r}: use {', '.join(METRICS)}")


def scored_mask(
    shape: tuple[int, int], window: int, stride: int, bos: bool, policy: PrefillPolicy
) -> torch.Tensor:
    """Which of the W - 1 predictions of each window count: [windows, W - 1] bool."""
    mask = torch.ones(shape, dtype=torch.bool)
    body = window - bos
    if stride < body:
        # Overlapping windows score only what the window before has not.
        mask[1:, : body - stride - (0 if bos else 1)] = False
    if policy.name == "decode_only":
        mask[:, : window // 2 - 1] = False
    return mask


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str | Text,
    *,
    window: int = 1024,
    tokens: int | None = None,
    stride: int | None = None,
    prefill: str | PrefillPolicy | None = None,
    metrics: Sequence[str] = ("perplexity",),
    dense_logits: DenseLogits | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of a model, dense or sparse, on a text.

    Windows do not overlap (unless `stride` says so), the tail is dropped, W - 1 of W tokens are
    scored. A window starts with BOS only if the tokenizer adds one. Under ``decode_only`` the first
    half of each window is a dense prefill and only the second half is sparse and scored.

    Args:
        model: causal LM of transformers, in eval mode.
        tokenizer: its tokenizer.
        text: a name for :func:`acttail.calibrate.text.read_text`, or a Text.
        window: tokens per window.
        tokens: how many tokens of the text to use, from its start; None for all.
        stride: tokens between the starts of windows; None for no overlap.
        prefill: overrides the policy the model was made sparse with.
        metrics: ``perplexity``, ``kl`` (to the dense model) and ``top1`` (agreement with it); the last
            two run the dense model beside the sparse one and see damage earlier, with less noise.
        dense_logits: reused between calls that differ in the plan alone.
        progress: called with (windows done, windows).

    Returns:
        The result with its protocol.

    Raises:
        TextError: text not found, empty, or shorter than one window.
        ActTailError: unknown prefill policy or metric.
    """
    check_metrics(metrics)
    compared = bool({"kl", "top1"} & set(metrics))
    started = time.perf_counter()
    text = read_text(text) if isinstance(text, str) else text
    state = sparse_state(model)
    policy = PrefillPolicy.parse(prefill) if prefill is not None else (
        state.policy if state else PrefillPolicy())  # fmt: skip
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise TextError(
            f"a window of {window} tokens is longer than the model's context of {limit}"
        )
    bos = bos_of(tokenizer)
    batches = windows(tokenize(text, tokenizer), window, tokens, stride, bos, text.name)
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(batches.max()) >= vocabulary:
        raise TextError(
            f"the tokenizer gives ids beyond the model's {vocabulary} embeddings; they do not match"
        )
    held = dense_logits or DenseLogits(limit=0)
    step = stride or window - (bos is not None)
    losses = torch.full((len(batches), window - 1), float("nan"))
    kl, same = torch.zeros_like(losses), torch.ones_like(losses)
    rows = _rows_of(policy, window)
    with ExitStack() as stack:
        counter = stack.enter_context(counting(model)) if state else None
        if state is not None:
            stack.callback(setattr, state, "rows", state.rows)
            hook, state.handle = state.handle, None
            if hook is not None:  # the policy is applied here, by window position
                hook.remove()
                stack.callback(_restore_hook, model, state)
            state.rows = rows
        stack.enter_context(torch.inference_mode())
        device = input_device(model)
        for i, batch in enumerate(batches):
            ids = batch[None].to(device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            losses[i] = token_losses(logits, ids[0, 1:]).cpu()
            if compared and state is not None:
                dense = held.get(i, functools.partial(_dense_logits, model, state, ids))
                kl[i], same[i] = (v.cpu() for v in divergence(dense.to(logits.device), logits))
                del dense
            del logits
            if progress is not None:
                progress(i + 1, len(batches))
    mask = scored_mask((len(batches), window - 1), window, step, bos is not None, policy)
    if not bool(torch.isfinite(losses[mask]).all()):
        # A mean over broken numbers would hide them.
        mean, error = math.nan, None
    else:
        mean, error = clustered_mean(losses, mask)
    kl_mean, top1_mean = (clustered_mean(v, mask) if compared else (None, None) for v in (kl, same))
    value = math.inf if mean >= 700 else math.exp(mean)  # exp overflows above 709
    return PerplexityResult(
        perplexity=value, perplexity_stderr=None if error is None else value * error,
        nll=mean, nll_stderr=error, tokens=batches.numel(), scored=int(mask.sum()),
        windows=len(batches), window=window, stride=step, bos=bos is not None,
        dtype=name_of(next(model.parameters()).dtype), prefill=str(policy),
        text=text.name, seconds=time.perf_counter() - started,
        realised=counter.realised() if counter else None,
        token_nll=torch.where(mask, losses, float("nan")),
        kl=kl_mean[0], kl_stderr=kl_mean[1], top1=top1_mean[0], top1_stderr=top1_mean[1],
        token_kl=torch.where(mask, kl, float("nan")) if compared else None,
    )  # fmt: skip


def _dense_logits(model: Any, state: SparseState, ids: torch.Tensor) -> torch.Tensor:
    """[T - 1, vocabulary] logits of the same model with every token dense."""
    rows, counts = state.rows, state.counts
    state.rows, state.counts = False, None
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, :-1]
        return logits
    finally:
        state.rows, state.counts = rows, counts


def _rows_of(policy: PrefillPolicy, window: int) -> torch.Tensor | bool:
    """The sparse rows of one whole window, [1, window]."""
    if policy.name == "decode_only":
        # Causal attention makes one masked pass equal to a dense prefill and sparse decoding.
        policy = PrefillPolicy("first_dense", window // 2)
    return policy.sparse_rows(1, window, 0, None)


def _restore_hook(model: Any, state: Any) -> None:

    state.handle = entry_hook(model)
