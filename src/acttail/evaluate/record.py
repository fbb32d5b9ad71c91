"""The record of one evaluation: the number and its whole protocol, as plain JSON data."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from acttail.checkpoint import LoadedWeights
from acttail.errors import ActTailError
from acttail.evaluate.perplexity import PerplexityResult
from acttail.evaluate.traffic import token_bytes
from acttail.files import replacing
from acttail.plan import created_with
from acttail.sparsify import sparse_state


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
        "perplexity": result.perplexity,
        "perplexity_stderr": result.perplexity_stderr,
        "nll": result.nll,
        "nll_stderr": result.nll_stderr,
        "kl": result.kl,
        "kl_stderr": result.kl_stderr,
        "top1": result.top1,
        "top1_stderr": result.top1_stderr,
        "tokens": result.tokens,
        "scored": result.scored,
        "windows": result.windows,
        "window": result.window,
        "stride": result.stride,
        "bos": result.bos,
        "dtype": result.dtype,
        "prefill": result.prefill,
        "text": result.text,
        "seconds": round(result.seconds, 3),
        "bytes_per_token": asdict(token_bytes(model, state.plan if state else None)),
        "projections": realised.projections if realised else {},
    }


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
