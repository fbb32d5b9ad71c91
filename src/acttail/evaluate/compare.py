"""Dense and several allocators at several sparsities, on the same windows of the same text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from acttail.allocate import AllocationContext, Needs, get, make_plan, needs_text
from acttail.allocate.sensitivity import curves_for
from acttail.base.progress import Progress
from acttail.calibrate.text import Text
from acttail.evaluate.dense_logits import DenseLogits
from acttail.evaluate.perplexity import PerplexityResult, perplexity
from acttail.evaluate.record import record
from acttail.maths.losses import clustered_mean
from acttail.model.weights import LoadedWeights
from acttail.sparse.apply import densify_, sparsified


def compare(
    model: Any,
    tokenizer: Any,
    text: Text,
    *,
    sparsities: Sequence[float],
    allocators: Mapping[str, Mapping[str, Any]],
    window: int = 1024,
    tokens: int | None = None,
    stride: int | None = None,
    prefill: str = "all",
    calibration: Any = None,
    metrics: Sequence[str] = ("perplexity",),
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Evaluate the dense model, then every allocator at every sparsity.

    Args:
        model: a dense causal LM; dense again afterwards, whatever happens.
        tokenizer: its tokenizer.
        text: the text to score.
        sparsities: model sparsities.
        allocators: name -> arguments.
        window: tokens per window.
        tokens: use only the first so many tokens.
        stride: tokens between window starts.
        prefill: the prefill policy.
        calibration: what calibrated allocators may see.
        metrics: see :func:`acttail.perplexity`.
        progress: called with (windows done, windows in all).

    Returns:
        Records as of :func:`acttail.evaluate.record.record`, dense first, with ``ratio_to_uniform``
        (perplexity over uniform's at the same sparsity, None if uniform was not run) and
        ``nll_difference_to_uniform`` with its paired standard error.
    """
    densify_(model)
    context = AllocationContext(LoadedWeights(model), calibration=calibration)
    for name, arguments in allocators.items():
        row = get(name)
        if row.needs is Needs.CURVES and not needs_text(name, arguments, "topk"):
            # A file of another model's curves is found out now, not after the dense model.
            curves_for(context, row.arguments(arguments))
    dense_logits = DenseLogits()
    cells = 1 + len(sparsities) * len(allocators)
    done = 0

    def run() -> PerplexityResult:
        nonlocal done

        def step(i: int, n: int) -> None:
            if progress is not None:
                progress(done * n + i, cells * n)

        result = perplexity(
            model, tokenizer, text, window=window, tokens=tokens, stride=stride, prefill=prefill,
            metrics=metrics, dense_logits=dense_logits, progress=step,
        )  # fmt: skip
        done += 1
        return result

    rows = [record(model, run()) | _against(None, None)]
    for sparsity in sparsities:
        results = []
        for name, arguments in allocators.items():
            # One budget for all, the head dense: with it in, equal S would not be equal bytes.
            plan = make_plan(
                model, sparsity, allocator=name, arguments=arguments, context=context, head=False
            )
            with sparsified(model, plan, prefill=prefill):
                result = run()
                results.append((name, result, record(model, result)))
        uniform = next((r for name, r, _ in results if name == "uniform"), None)
        rows += [row | _against(result, uniform) for _, result, row in results]
    return rows


def _against(result: PerplexityResult | None, uniform: PerplexityResult | None) -> dict[str, Any]:
    if result is None or uniform is None or not math.isfinite(result.nll + uniform.nll):
        return {
            "ratio_to_uniform": None,
            "nll_difference_to_uniform": None,
            "nll_difference_stderr": None,
        }
    difference = result.token_nll - uniform.token_nll
    mean, error = clustered_mean(difference, torch.isfinite(difference))
    return {
        "ratio_to_uniform": result.perplexity / uniform.perplexity,
        "nll_difference_to_uniform": mean,
        "nll_difference_stderr": error,
    }
