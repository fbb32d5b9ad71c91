"""Decoding on a GPU through transformers: dense and sparse, eager, compiled and as a CUDA graph, by turns.

Every contestant decodes greedily at batch 1 with a static KV cache of the same length. A graph contestant
records one step (model, argmax, next token) and replays it, so that a run of tokens never waits for the
host. On a CPU the eager contestants run, which is how this file is tested without a GPU.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from acttail.allocate import make_plan
from acttail.base.dtypes import FLOATS, short_name, torch_name
from acttail.base.progress import Progress
from acttail.engine.accounting import loaded_bytes
from acttail.errors import ActTailError
from acttail.evaluate.speed import Speed, measure
from acttail.model.load import load
from acttail.model.opened import Opened
from acttail.plan import SparsityPlan
from acttail.sparse.apply import densify_, sparsify_
from acttail.sparse.backends import triton

# How a contestant runs its steps.
MODES = ("eager", "compiled", "graph")
_WARM_STEPS = 3
_READ_BYTES = 1 << 30


class StaticDecoder:
    """Greedy decoding of one sequence with a static cache.

    Args:
        model: causal LM of transformers, dense or sparse in place, on its device.
        mode: ``eager``, ``compiled`` (torch.compile, max-autotune) or ``graph`` (a recorded CUDA graph).
        context: positions of the KV cache.

    Raises:
        ActTailError: an unknown mode, or a graph without a CUDA or ROCm device.
    """

    def __init__(self, model: Any, mode: str, context: int) -> None:
        if mode not in MODES:
            raise ActTailError(f"unknown mode {mode!r}: use {', '.join(MODES)}")
        self.model, self.context = model, context
        self.device = next(model.parameters()).device
        if mode == "graph" and self.device.type != "cuda":
            raise ActTailError("a CUDA graph needs a CUDA or ROCm device")
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self._cache: Any = None
        self._replay: Callable[[], None] | None = None
        self._mode = mode
        self._forward = torch.compile(model, mode="max-autotune") if mode == "compiled" else model

    def round(self, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        """(seconds of the prefill, seconds of decoding new_tokens more).

        Args:
            prompt: [n] int64.
            new_tokens: decoded after the first.

        Raises:
            ActTailError: the sequence does not fit the cache.
        """
        if len(prompt) + new_tokens + 1 > self.context:
            raise ActTailError(
                f"{len(prompt)} + {new_tokens} tokens do not fit a cache of {self.context}"
            )
        with torch.no_grad():
            self._start()
            self._wait()
            started = time.perf_counter()
            logits = self.model(
                input_ids=prompt[None].to(self.device),
                past_key_values=self._cache,
                logits_to_keep=1,
            ).logits
            self._token.copy_(logits[:, -1:].argmax(-1))
            self._wait()
            middle = time.perf_counter()
            for _ in range(new_tokens):
                self._step()
            self._wait()
        return middle - started, time.perf_counter() - middle

    def tokens(self, prompt: torch.Tensor, new_tokens: int) -> list[int]:
        """The ids that a round decodes, the first one included; for checks.

        Args:
            prompt: [n] int64.
            new_tokens: as in :meth:`round`.
        """
        self.round(prompt, 0)
        found = [int(self._token)]
        with torch.no_grad():
            for _ in range(new_tokens):
                self._step()
                found.append(int(self._token))
        return found

    def _start(self) -> None:
        """An empty cache; a recorded graph keeps its memory and is told to begin again."""
        from transformers import StaticCache

        if self._cache is None:
            self._cache = StaticCache(config=self.model.config, max_cache_len=self.context)
            if self._mode != "eager":
                self._warm()
        self._cache.reset()

    def _warm(self) -> None:
        """Compile, or record the graph, on a prompt of one token."""
        self.model(input_ids=self._token, past_key_values=self._cache, logits_to_keep=1)
        side: Any = torch.cuda.Stream() if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_STEPS):
                self._one()
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)
        if self._mode == "graph":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._one()
            self._replay = graph.replay

    def _one(self) -> None:
        logits = self._forward(
            input_ids=self._token, past_key_values=self._cache, logits_to_keep=1
        ).logits
        self._token.copy_(logits[:, -1:].argmax(-1))

    def _step(self) -> None:
        if self._replay is not None:
            self._replay()
        else:
            self._one()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that summing 1 GiB reads from the device's memory, the best of five runs."""
    data = torch.ones(_READ_BYTES // 4, device=device)
    best = 0.0
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        data.sum()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, _READ_BYTES / (time.perf_counter() - started))
    return best


def gpu_bench(
    model: Any, plan: SparsityPlan, prompt: torch.Tensor, *, new_tokens: int, rounds: int,
    modes: Sequence[str] = MODES, progress: Progress | None = None,
) -> tuple[Speed, dict[str, int]]:  # fmt: skip
    """Time a model under a plan against itself dense, by turns.

    Two models hold the weights, one input-major and sparse, one dense.

    Args:
        model: dense causal LM on its device; is dense again afterwards.
        plan: made for it, of the rule ``topk``.
        prompt: [n] int64.
        new_tokens: decoded in a round.
        rounds: of each contestant.
        modes: of :data:`MODES`.
        progress: called with (runs done, runs).

    Returns:
        The times, contestants ``sparse MODE`` and ``dense MODE``; and the bytes a token reads by each.
    """
    import copy

    context = len(prompt) + new_tokens + 2
    sparse = copy.deepcopy(model)
    sparsify_(sparse, plan, native=True)
    contestants: dict[str, Any] = {}
    traffic = {}
    for mode in modes:
        for name, lm, used in (("sparse", sparse, plan), ("dense", model, None)):
            contestants[f"{name} {mode}"] = StaticDecoder(lm, mode, context)
            traffic[f"{name} {mode}"] = loaded_bytes(lm, used).sparse
    try:
        return (
            measure(contestants, prompt, new_tokens=new_tokens, rounds=rounds, progress=progress),
            traffic,
        )
    finally:
        densify_(sparse)


def run_gpu_bench(
    model: str | os.PathLike[str] | Opened, *, device: str, plan: SparsityPlan | str | None = None, dtype: str = "bfloat16", prompt_tokens: int = 128,
    new_tokens: int = 128, rounds: int = 7, modes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `acttail bench --device` runs.

    Args:
        model: Hub id, folder, GGUF file or alias.
        device: ``cuda``, ``cuda:N``, or ``cpu`` (eager alone).
        plan: a plan or its file; by default half of every input.
        dtype: of the weights: bfloat16, float16 or float32.
        prompt_tokens: of the prompt.
        new_tokens: decoded per run.
        rounds: of each contestant.
        modes: eager, compiled, graph; all by default, eager alone on a CPU.
        progress: called with (runs done, runs).

    Returns:
        Plain data: medians of tokens per second, ratios of the fastest sparse contestant over each dense
        one with their spread, bytes per token, bandwidth and its share, the protocol.

    Raises:
        ActTailError: no such device, no Triton, or bad arguments.
    """
    dtype = torch_name(dtype)
    if dtype not in FLOATS:
        raise ActTailError(
            f"a GPU runs {', '.join(map(short_name, FLOATS))} through transformers, not {dtype!r}"
        )
    place = _device(device)
    modes = tuple(modes or (MODES if place.type == "cuda" else ("eager",)))
    lm, _ = load(model, dtype=dtype, device=place)
    if isinstance(plan, str):
        plan = SparsityPlan.load(plan)
    if plan is None:
        plan = make_plan(lm, 0.5, allocator="uniform")
    generator = torch.Generator().manual_seed(0)
    vocabulary = lm.get_input_embeddings().num_embeddings
    prompt = torch.randint(vocabulary // 10, vocabulary, (prompt_tokens,), generator=generator)
    speed, traffic = gpu_bench(
        lm, plan, prompt, new_tokens=new_tokens, rounds=rounds, modes=modes, progress=progress
    )
    per_second = {n: speed.median(n) for n in speed.decode}
    best = max((n for n in per_second if n.startswith("sparse")), key=lambda n: per_second[n])
    reads = read_bandwidth(place)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
    return {
        "model": lm.acttail_source.name, "device": name, "dtype": dtype, "engine": "transformers",
        "backend": "triton" if place.type == "cuda" else "cpu", "sparsity": plan.sparsity,
        "realised_sparsity": plan.realised_sparsity, "allocator": plan.allocator, "rule": plan.rule,
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds,
        "tokens_per_second": per_second, "fastest": best,
        "ratios": {n: vars(speed.ratio(best, n)) for n in per_second if n.startswith("dense")},
        "bytes_per_token": traffic, "bandwidth": reads,
        "bandwidth_share": {n: traffic[n] * per_second[n] / reads for n in per_second},
    }  # fmt: skip


def _device(name: str) -> torch.device:
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise ActTailError(f"no such device {name!r}: use cuda, cuda:N or cpu") from error
    if place.type not in ("cuda", "cpu"):
        raise ActTailError(f"decoding is measured on cuda (ROCm included) and cpu, not on {name!r}")
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ActTailError("torch sees no CUDA or ROCm device; leave --device out for the CPU")
        if not triton.status().available:
            raise ActTailError(f"sparse decoding on a GPU: {triton.status().reason}")
    return place
