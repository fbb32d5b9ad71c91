"""One benchmark of decoding: what `acttail bench` and the scripts in benchmarks/ run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from acttail.engine import Engine, NativeEngine
from acttail.engine.source import open_for_engine
from acttail.errors import ActTailError
from acttail.evaluate.speed import (
    Contestant,
    EagerContestant,
    EngineContestant,
    Progress,
    Speed,
    bandwidth,
    bytes_per_token,
    check_rounds,
    measure,
)
from acttail.models import load, resolve
from acttail.plan import SparsityPlan

_TORCH = {"fp32": "float32", "bf16": "bfloat16", "int8": "bfloat16", "int4": "bfloat16"}


def run_bench(
    model: str | os.PathLike[str], *, plan: SparsityPlan | str | None = None, sparsity: float | None = None,
    dtype: str = "bf16", threads: int | None = None, prompt_tokens: Sequence[int] = (128,),
    new_tokens: int = 128, rounds: int = 7, against: Sequence[str] = (), gguf: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a model's decoding, sparse against dense and against others, by turns.

    Args:
        model: Hub id, folder, GGUF file or alias.
        plan: a plan or its file.
        sparsity: without a plan, the same sparsity everywhere; 0.5 by default.
        dtype: of the engine's weights.
        threads: that decode, in every contestant; all of torch's by default.
        prompt_tokens: lengths of the prompt; ratios are of the first.
        new_tokens: decoded per run.
        rounds: runs of each contestant.
        against: ``hf`` and ``llama.cpp``.
        gguf: llama.cpp's file.
        progress: called with (runs done, runs).

    Returns:
        Plain data: ``tokens_per_second`` and ``prefill_tokens_per_second`` (medians) of ``sparse``,
        ``dense`` and the others; ``ratios`` of sparse over each, with ``dense_ratios`` of our dense over
        the others; ``bytes_per_token``, ``bandwidth`` and ``bandwidth_share``; the protocol.

    Raises:
        ActTailError: bad arguments, or a contestant is not available.
    """
    for n in prompt_tokens:
        check_rounds(rounds, new_tokens, n)
    from acttail.allocate import make_plan

    count = threads or torch.get_num_threads()
    if isinstance(plan, str):
        plan = SparsityPlan.load(plan)
    if plan is None:
        wanted = 0.5 if sparsity is None else sparsity
        weights = open_for_engine(model, own_blocks=False).weights
        plan = make_plan(weights, wanted, allocator="uniform")
    longest = max(prompt_tokens) + new_tokens + 2
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        sparse = Engine.from_pretrained(model, plan, dtype=dtype, threads=count)
        contestants: dict[str, Contestant] = {"sparse": EngineContestant(sparse)}
        if isinstance(sparse, NativeEngine):
            dense = NativeEngine(
                sparse.packed,
                None,
                sparse.tokenizer,
                count,
                "all",
                sparse.decoder.kv_dtype,
                frozenset(),
            )
            contestants["dense"] = EngineContestant(dense)
        if "hf" in against:
            lm, _ = load(model, dtype=_TORCH[dtype])
            contestants["hf"] = EagerContestant(lm)
        if "llama.cpp" in against:
            contestants["llama.cpp"] = _llama_cpp(model, gguf, dtype, count, longest)
        speeds = [
            measure(
                contestants,
                _prompt(sparse, n),
                new_tokens=new_tokens,
                rounds=rounds,
                progress=progress,
            )
            for n in prompt_tokens
        ]
        reads = bandwidth(count) if isinstance(sparse, NativeEngine) else 0.0
    finally:
        torch.set_num_threads(before)
    traffic = {}
    if isinstance(sparse, NativeEngine):
        middle = prompt_tokens[0] + new_tokens // 2
        traffic = {n: bytes_per_token(c.engine, middle) for n, c in contestants.items()
                   if isinstance(c, EngineContestant) and isinstance(c.engine, NativeEngine)}  # fmt: skip
    return _row(
        sparse, plan, dtype, count, speeds, list(prompt_tokens), new_tokens, rounds, traffic, reads
    )


def _prompt(engine: Engine, n: int) -> torch.Tensor:
    """Token ids that no special token is among; the same for every contestant."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = (
        engine.packed.layout.spec.vocabulary
        if isinstance(engine, NativeEngine)
        else engine.model.get_input_embeddings().num_embeddings  # type: ignore[attr-defined]
    )
    return torch.randint(vocabulary // 10, vocabulary, (n,), generator=generator)


def _llama_cpp(
    model: str | os.PathLike[str], gguf: str | None, dtype: str, threads: int, context: int
) -> Contestant:
    from acttail.evaluate.llama_cpp import LlamaCppContestant, requantised

    if gguf is not None:
        return LlamaCppContestant(gguf, threads, context)
    source = resolve(model)
    if source.kind != "gguf" or source.path is None:
        raise ActTailError("llama.cpp needs a GGUF of this model: give --gguf FILE")
    return LlamaCppContestant(requantised(Path(source.path), dtype), threads, context)


def _row(
    engine: Engine, plan: SparsityPlan, dtype: str, threads: int, speeds: list[Speed],
    prompts: list[int], new_tokens: int, rounds: int, traffic: dict[str, float], reads: float,
) -> dict[str, Any]:  # fmt: skip
    first = speeds[0]
    others = [n for n in first.decode if n != "sparse"]
    rest = [n for n in others if n != "dense"] if "dense" in first.decode else []
    per_second = {n: first.median(n) for n in first.decode}
    return {
        "model": engine.source, "engine": engine.name, "dtype": dtype, "threads": threads,
        "sparsity": plan.sparsity, "realised_sparsity": plan.realised_sparsity, "allocator": plan.allocator,
        "rule": plan.rule, "prompt_tokens": prompts[0], "new_tokens": new_tokens, "rounds": rounds,
        "tokens_per_second": per_second,
        "prefill_tokens_per_second": {n: first.median(n, prefill=True) for n in first.prefill},
        "ratios": {n: vars(first.ratio("sparse", n)) for n in others},
        "dense_ratios": {n: vars(first.ratio("dense", n)) for n in rest},
        "prefill_ratios": {n: vars(first.ratio("sparse", n, prefill=True)) for n in others},
        "bytes_per_token": traffic, "bandwidth": reads,
        "bandwidth_share": {n: b * per_second[n] / reads for n, b in traffic.items()} if reads else {},
        "dense_kernel": sorted(engine.decoder.dense_kernel) if isinstance(engine, NativeEngine) else [],
        "contexts": [
            {"prompt_tokens": p, "tokens_per_second": {n: s.median(n) for n in s.decode}}
            for p, s in zip(prompts, speeds, strict=True)
        ],
    }  # fmt: skip
