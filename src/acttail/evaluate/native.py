"""Perplexity of the native engine: the numbers of the kernels that will run, not of a model of them."""

import functools
import math
import time
from collections.abc import Sequence

import torch

from acttail.base.progress import Progress
from acttail.calibrate.text import Text, bos_of, read_text, tokenize, windows
from acttail.engine import NativeEngine
from acttail.engine.accounting import read_share
from acttail.errors import ActTailError, TextError
from acttail.evaluate.dense_logits import DenseLogits
from acttail.evaluate.perplexity import PerplexityResult, check_metrics, scored_mask
from acttail.maths.budget import model_sparsity
from acttail.maths.losses import clustered_mean, divergence, token_losses
from acttail.sparse.counting import RealisedSparsity
from acttail.sparse.policy import PrefillPolicy
from acttail.sparse.rules import kind_of


def check_policy(policy: PrefillPolicy) -> None:
    """Refuse a prefill policy that the native engine is not scored under.

    Raises:
        ActTailError: names it.
    """
    if policy.name not in ("all", "decode_only"):
        raise ActTailError(
            f"the native engine is scored under the policies all and decode_only, not {policy}; "
            "use --engine transformers"
        )


def native_perplexity(
    engine: NativeEngine,
    text: str | Text,
    *,
    window: int = 1024,
    tokens: int | None = None,
    stride: int | None = None,
    metrics: Sequence[str] = ("perplexity",),
    dense_logits: DenseLogits | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """As :func:`acttail.perplexity`, every sparse token decoded by the engine's own kernels.

    KL and top-1 agreement are to the same engine, the same weights, without the plan.

    Args:
        engine: with a tokenizer; its prefill policy is ``all`` or ``decode_only``.
        text: a name for :func:`acttail.calibrate.text.read_text`, or a Text.
        window: tokens per window.
        tokens: how many tokens of the text to use.
        stride: tokens between the starts of windows.
        metrics: ``perplexity``, ``kl``, ``top1``.
        dense_logits: reused between calls that differ in the plan alone.
        progress: called with (windows done, windows).

    Returns:
        The result with its protocol; the realised sparsity of a plan of thresholds is counted.

    Raises:
        TextError: see :func:`acttail.perplexity`.
        ActTailError: no tokenizer, another policy, or an unknown metric.
    """
    check_metrics(metrics)
    check_policy(engine.policy)
    if engine.tokenizer is None:
        raise ActTailError("the engine has no tokenizer, so it cannot read a text")
    if window > engine.context:
        raise TextError(
            f"a window of {window} tokens is longer than the context of {engine.context}"
        )
    started = time.perf_counter()
    text = read_text(text) if isinstance(text, str) else text
    bos = bos_of(engine.tokenizer)
    batches = windows(tokenize(text, engine.tokenizer), window, tokens, stride, bos, text.name)
    spec = engine.packed.layout.spec
    if int(batches.max()) >= spec.vocabulary:
        raise TextError(f"the tokenizer gives ids beyond the model's {spec.vocabulary}")
    compared = bool({"kl", "top1"} & set(metrics)) and engine.plan is not None
    dense = engine.with_plan(None, prefill="all") if compared else None
    held = dense_logits or DenseLogits(limit=0)
    step = stride or window - (bos is not None)
    losses = torch.full((len(batches), window - 1), float("nan"))
    kl, same = torch.zeros_like(losses), torch.ones_like(losses)
    read = 0.0
    for i, ids in enumerate(batches):
        logits, weights = _logits(engine, ids)
        read += weights
        losses[i] = token_losses(logits, ids[1:])
        if dense is not None:
            target = held.get(i, functools.partial(_dense, dense, ids))
            kl[i], same[i] = divergence(target, logits)
        if progress is not None:
            progress(i + 1, len(batches))
    mask = scored_mask((len(batches), window - 1), window, step, bos is not None, engine.policy)
    if bool(torch.isfinite(losses[mask]).all()):
        mean, error = clustered_mean(losses, mask)
    else:
        mean, error = math.nan, None
    kl_mean, top1_mean = (clustered_mean(v, mask) if compared else (None, None) for v in (kl, same))
    value = math.inf if mean >= 700 else math.exp(mean)
    decoded = batches.numel() if engine.policy.name == "all" else batches.numel() // 2
    return PerplexityResult(
        perplexity=value, perplexity_stderr=None if error is None else value * error,
        nll=mean, nll_stderr=error, tokens=batches.numel(), scored=int(mask.sum()),
        windows=len(batches), window=window, stride=step, bos=bos is not None, dtype=engine.dtype,
        prefill=str(engine.policy), text=text.name, seconds=time.perf_counter() - started,
        realised=_realised(engine, read / decoded), token_nll=torch.where(mask, losses, float("nan")),
        kl=kl_mean[0], kl_stderr=kl_mean[1], top1=top1_mean[0], top1_stderr=top1_mean[1],
        token_kl=torch.where(mask, kl, float("nan")) if compared else None,
    )  # fmt: skip


def _logits(engine: NativeEngine, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """[n - 1, vocabulary] logits of one window, and how many weights decoding read."""
    sequence = engine.new_sequence(len(ids))
    if engine.policy.name == "all":
        logits = sequence.all_logits(ids, decode=True)
        return logits[:-1], sequence.weights_read
    first = sequence.all_logits(ids[: len(ids) // 2])
    second = sequence.all_logits(ids[len(ids) // 2 :], decode=True)
    return torch.cat([first, second])[:-1], sequence.weights_read


def _dense(engine: NativeEngine, ids: torch.Tensor) -> torch.Tensor:
    return _logits(engine, ids)[0]


def _realised(engine: NativeEngine, read: float) -> RealisedSparsity | None:
    """Realised sparsity; where k varies only the model's is known, from the weights that were read."""
    if engine.plan is None:
        return None
    entries = engine.plan.projections
    by_name = {n: e.realised_sparsity for n, e in entries.items()}
    if kind_of(engine.plan).fixed_k:
        costs = [e.cost for e in entries.values()]
        return RealisedSparsity(by_name, model_sparsity(list(by_name.values()), costs))
    return RealisedSparsity(by_name, 1 - read_share(engine.packed.layout, read))
