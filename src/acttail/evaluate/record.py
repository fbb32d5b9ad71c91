"""The record of one evaluation: the number and its whole protocol, as plain JSON data."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from acttail.checkpoint import LoadedWeights
from acttail.engine import NativeEngine
from acttail.errors import ActTailError
from acttail.evaluate.perplexity import PerplexityResult
from acttail.evaluate.speed import head_bytes
from acttail.evaluate.traffic import token_bytes
from acttail.files import replacing
from acttail.plan import created_with
from acttail.sparsify import sparse_state

_FIELDS = (
    "perplexity", "perplexity_stderr", "nll", "nll_stderr", "kl", "kl_stderr", "top1", "top1_stderr",
    "tokens", "scored", "windows", "window", "stride", "bos", "dtype", "prefill", "text",
)  # fmt: skip


def identity(model: Any) -> dict[str, Any]:
    """Which model, under which plan, with which versions.

    Args:
        model: a causal LM, dense or sparse.
    """
    state = sparse_state(model)
    plan = state.plan if state else None
    source = getattr(model, "acttail_source", None)
    return {
        "model": LoadedWeights(model).name,
        "revision": (source.revision if source else None)
        or getattr(model.config, "_commit_hash", None),
        "allocator": plan.allocator if plan else None,
        "rule": plan.rule if plan else None,
        "arguments": plan.arguments if plan else {},
        "sparsity": plan.sparsity if plan else 0.0,
        "engine": "transformers",
        "versions": created_with(),
    }


def record(model: Any, result: PerplexityResult) -> dict[str, Any]:
    """One row: what was measured, on what, how.

    Args:
        model: the model as it was evaluated.
        result: of :func:`acttail.perplexity`.
    """
    state = sparse_state(model)
    realised = result.realised
    return identity(model) | {
        "realised_sparsity": realised.model if realised else 0.0,
        **{k: getattr(result, k) for k in _FIELDS},
        "seconds": round(result.seconds, 3),
        "bytes_per_token": asdict(token_bytes(model, state.plan if state else None)),
        "projections": realised.projections if realised else {},
    }


def native_record(engine: NativeEngine, result: PerplexityResult) -> dict[str, Any]:
    """The row of :func:`record` for the native engine.

    Args:
        engine: as it was evaluated.
        result: of :func:`acttail.evaluate.native.native_perplexity`.
    """
    plan = engine.plan
    layout = engine.packed.layout
    head = head_bytes(layout)
    projections = sum(layout.shapes[n].rows * layout.shapes[n].row_bytes for n in layout.segments)
    realised = result.realised
    kept = 1 - realised.model if realised else 1.0
    return {
        "model": engine.source, "engine": engine.name, "revision": None,
        "allocator": plan.allocator if plan else None, "rule": plan.rule if plan else None,
        "arguments": plan.arguments if plan else {}, "sparsity": plan.sparsity if plan else 0.0,
        "versions": created_with(),
        "realised_sparsity": realised.model if realised else 0.0,
        **{k: getattr(result, k) for k in _FIELDS},
        "seconds": round(result.seconds, 3),
        "bytes_per_token": {
            "dense": projections + head, "sparse": round(projections * kept) + head,
            "projections": projections, "lm_head": head, "other": 0,
        },
        "projections": realised.projections if realised else {},
    }  # fmt: skip


def save_token_nll(path: str | os.PathLike[str], result: PerplexityResult) -> None:
    """Write per-token losses, [windows, window - 1] float32 in nats, NaN where not scored.

    Args:
        path: ends in .npy or .safetensors (tensor ``nll``).
        result: of :func:`acttail.perplexity`.

    Raises:
        ActTailError: another ending, or the file cannot be written.
    """
    from safetensors.torch import save_file

    suffix = Path(path).suffix
    if suffix not in (".npy", ".safetensors"):
        raise ActTailError(f"losses are saved as .npy or .safetensors, not as {path}")
    with replacing(path) as temporary:
        if suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, result.token_nll.numpy())
        else:
            save_file({"nll": result.token_nll}, temporary)
