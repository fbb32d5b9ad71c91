"""The record of one evaluation: the number and its whole protocol, as plain JSON data."""

import os
from dataclasses import asdict
from typing import Any

import numpy as np

from acttail.base.files import check_ending, replacing
from acttail.base.tensors import write_tensors
from acttail.engine import NativeEngine
from acttail.engine.accounting import loaded_bytes, packed_bytes
from acttail.evaluate.perplexity import PerplexityResult
from acttail.model.weights import LoadedWeights
from acttail.plan import created_with
from acttail.sparse.rules import kind_of
from acttail.sparse.state import sparse_state

_FIELDS = (
    "perplexity", "perplexity_stderr", "nll", "nll_stderr", "kl", "kl_stderr", "top1", "top1_stderr",
    "tokens", "scored", "windows", "window", "stride", "bos", "dtype", "prefill", "text",
)  # fmt: skip


# What :func:`save_token_nll` writes.
NLL_ENDINGS = (".npy", ".safetensors")


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
        "bytes_per_token": asdict(loaded_bytes(model, state.plan if state else None)),
        "projections": realised.projections if realised else {},
    }


def native_record(engine: NativeEngine, result: PerplexityResult) -> dict[str, Any]:
    """The row of :func:`record` for the native engine.

    Args:
        engine: as it was evaluated.
        result: of :func:`acttail.evaluate.native.native_perplexity`.
    """
    plan = engine.plan
    realised = result.realised
    # Where k varies, what was realised was counted as weights read; else the plan says it.
    counted = plan is not None and realised is not None and not kind_of(plan).fixed_k
    share = 1 - realised.model if counted and realised else None
    read = packed_bytes(engine.packed, plan, dense_kernel=engine.decoder.dense_kernel, share=share)
    return {
        "model": engine.source, "engine": engine.name, "revision": None,
        "allocator": plan.allocator if plan else None, "rule": plan.rule if plan else None,
        "arguments": plan.arguments if plan else {}, "sparsity": plan.sparsity if plan else 0.0,
        "versions": created_with(),
        "realised_sparsity": realised.model if realised else 0.0,
        **{k: getattr(result, k) for k in _FIELDS},
        "seconds": round(result.seconds, 3),
        "bytes_per_token": asdict(read),
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
    suffix = check_ending(path, NLL_ENDINGS, "a table of losses")
    if suffix == ".safetensors":
        write_tensors(path, {"nll": result.token_nll})
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, result.token_nll.numpy())
