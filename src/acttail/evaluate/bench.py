"""One benchmark of decoding: what `acttail bench` and the scripts in benchmarks/ run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from acttail.base.dtypes import short_name
from acttail.base.progress import Progress
from acttail.engine import Engine, NativeEngine
from acttail.engine.config import EngineConfig
from acttail.errors import ActTailError
from acttail.evaluate.forecast import forecast_of
from acttail.evaluate.request import PlanRequest, requested
from acttail.evaluate.speed import (
    Contestant,
    EagerContestant,
    EngineContestant,
    Speed,
    bandwidth,
    bytes_per_token,
    check_rounds,
    measure,
    share_read,
)
from acttail.model.names import PackedSource
from acttail.model.opened import Opened, open_model
from acttail.plan import SparsityPlan
from acttail.sparse.rules import kind_of

# Instead of a peer's file: the model's own, as it is.
OWN = "own"


def run_bench(
    model: str | os.PathLike[str] | Opened, *, plan: SparsityPlan | PlanRequest | str | None = None,
    dtype: str | None = None, threads: int | None = None, prompt_tokens: Sequence[int] = (128,),
    new_tokens: int = 128, rounds: int = 7, against: Sequence[str] = (), gguf: str | None = None,
    lossless: Mapping[str, bool] | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a model's decoding, sparse against dense and against others, by turns.

    Args:
        model: Hub id, folder, GGUF file or alias.
        plan: a plan, its file, or a request for one; by default the model's own, else half of every input.
        dtype: of the engine's weights; by default the widths of a GGUF file or an .acttail folder, else ``bf16``.
        threads: that decode, in every contestant; all of torch's by default.
        prompt_tokens: lengths of the prompt; ratios are of the first.
        new_tokens: decoded per run.
        rounds: runs of each contestant.
        against: ``hf`` and ``llama.cpp``.
        gguf: llama.cpp's file as it is; ``own`` is the model's own.
        lossless: who drafts for a lossless contestant, as :meth:`acttail.engine.Engine.lossless` takes it; None for
            none. n-grams have it easy in what follows a random prompt, which repeats itself.
        progress: called with (runs done, runs).

    Returns:
        Plain data: ``tokens_per_second`` and ``prefill_tokens_per_second`` (medians) of ``sparse``,
        ``dense`` and the others; ``ratios`` of sparse over each, with ``dense_ratios`` of our dense over
        the others; ``drafts`` of the lossless contestant's last round; ``bytes_per_token``, ``bandwidth`` and ``bandwidth_share``; the protocol.

    Raises:
        ActTailError: bad arguments, or a contestant is not available.
    """
    for n in prompt_tokens:
        check_rounds(rounds, new_tokens, n)
    config = EngineConfig(dtype, threads=threads)
    check_peer_file(gguf)
    opened = open_model(model)
    count = threads or torch.get_num_threads()
    if "llama.cpp" in against:
        check_llama_cpp(opened, gguf)
    made = plan_for(opened, plan)
    longest = max(prompt_tokens) + new_tokens + 2
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        sparse = Engine.from_pretrained(opened, made, dtype=config.dtype, threads=count)
        contestants: dict[str, Contestant] = {"sparse": EngineContestant(sparse)}
        if isinstance(sparse, NativeEngine):
            contestants["dense"] = EngineContestant(sparse.with_plan(None, prefill="all"))
        if lossless is not None:
            contestants["lossless"] = EngineContestant(sparse.lossless(**lossless))
        if "hf" in against:
            lm, _ = opened.load(dtype=config.weights.transformers)
            contestants["hf"] = EagerContestant(lm)
        if "llama.cpp" in against:
            contestants["llama.cpp"] = _llama_cpp(opened, gguf, config, count, longest)
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
    row = _row(sparse, made, count, speeds, list(prompt_tokens), new_tokens, rounds, traffic, reads)
    speculative = contestants.get("lossless")
    if isinstance(speculative, EngineContestant) and speculative.drafts is not None:
        found = speculative.drafts
        row["drafts"] = found.to_dict() | {"said": str(found)}
        row["lossless_ratio"] = vars(speeds[0].ratio("lossless", "dense"))
    return row


def plan_for(model: Opened, plan: SparsityPlan | PlanRequest | str | None) -> SparsityPlan:
    """The plan of a benchmark: one, that of a file, of a request, the model's own, or half of every input."""
    if isinstance(plan, str):
        return SparsityPlan.load(plan)
    if plan is None:
        plan = own_plan(model)
    if isinstance(plan, SparsityPlan):
        return plan
    return requested(model, plan or PlanRequest(0.5, allocator="uniform")).plan


def own_plan(model: Opened) -> SparsityPlan | None:
    """The plan that a model carries inside; None if it has none."""
    if isinstance(model.source, PackedSource):
        packed: SparsityPlan | None = getattr(model.stored, "plan", None)
        return packed
    carried = {} if model.source.gguf is not None else model.quantization
    return SparsityPlan.from_dict(carried["plan"]) if "plan" in carried else None


def check_peer_file(gguf: str | None) -> None:
    """Refuse a peer's file that is named and not there.

    Raises:
        ActTailError: names it.
    """
    if gguf not in (None, OWN) and not Path(str(gguf)).is_file():
        raise ActTailError(f"no such file: {gguf}")


def check_llama_cpp(model: Opened, gguf: str | None) -> None:
    """Refuse a contest that llama.cpp cannot enter.

    Raises:
        ActTailError: its package is missing, the file is not there, or the model is no GGUF.
    """
    from acttail.evaluate.llama_cpp import require

    require()
    check_peer_file(gguf)
    if gguf in (None, OWN) and model.source.gguf is None:
        raise ActTailError("llama.cpp needs a GGUF of this model: give --peer-file FILE")


def _prompt(engine: Engine, n: int) -> torch.Tensor:
    """Token ids that no special token is among; the same for every contestant."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = engine.vocabulary
    return torch.randint(vocabulary // 10, vocabulary, (n,), generator=generator)


def _llama_cpp(
    opened: Opened, gguf: str | None, config: EngineConfig, threads: int, context: int
) -> Contestant:
    from acttail.evaluate.llama_cpp import LlamaCppContestant, requantised

    if gguf not in (None, OWN):
        return LlamaCppContestant(str(gguf), threads, context)
    own = opened.source.gguf
    if own is None:
        raise ActTailError("llama.cpp needs a GGUF of this model: give --peer-file FILE")
    as_it_is = gguf == OWN or config.own_widths
    path = own if as_it_is else requantised(own, config.weights.name)
    return LlamaCppContestant(path, threads, context)


def _row(
    engine: Engine, plan: SparsityPlan, threads: int, speeds: list[Speed],
    prompts: list[int], new_tokens: int, rounds: int, traffic: dict[str, float], reads: float,
) -> dict[str, Any]:  # fmt: skip
    first = speeds[0]
    others = [n for n in first.decode if n != "sparse"]
    rest = [n for n in others if n != "dense"] if "dense" in first.decode else []
    per_second = {n: first.median(n) for n in first.decode}
    return {
        "model": engine.source, "engine": engine.name, "dtype": short_name(engine.dtype), "threads": threads,
        "sparsity": plan.sparsity, "realised_sparsity": _realised(engine, plan, prompts[0] + new_tokens // 2), "allocator": plan.allocator,
        "rule": plan.rule, "forecast": forecast_of(plan), "prompt_tokens": prompts[0], "new_tokens": new_tokens, "rounds": rounds,
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


def _realised(engine: Engine, plan: SparsityPlan, context: int) -> float:
    """Of a plan of thresholds what a token at this context really leaves unread; others say it themselves."""
    if kind_of(plan).fixed_k or not isinstance(engine, NativeEngine):
        return plan.realised_sparsity
    return 1 - share_read(engine, context)
