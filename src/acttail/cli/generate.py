"""`acttail generate`: continue a prompt, dense or under a plan."""

import sys
from typing import Annotated

import typer

from acttail.cli.common import Json, Model, Prefill, TrustRemoteCode, err, print_json
from acttail.cli.engines import AnyDtype, EngineName, Threads, open_engine
from acttail.errors import ActTailError


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    plan: Annotated[str | None, typer.Option(help="Plan file; dense without one.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 for all.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.", max=1)] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(help="Drop what is less likely than this share of the best.", min=0, max=1),
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 for none.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End at this string; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    engine: EngineName = "auto",
    dtype: AnyDtype = "bf16",
    threads: Threads = None,
    prefill: Prefill = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Generate text and say how fast, and which engine ran."""
    from acttail.engine import Generation, Sampling
    from acttail.plan import SparsityPlan
    from acttail.prefill import PrefillPolicy

    if not prompt:
        raise ActTailError("the prompt is empty")
    policy = PrefillPolicy.parse(prefill or "all")
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    loaded = SparsityPlan.load(plan) if plan else None
    runner = open_engine(
        model, loaded, engine=engine, dtype=dtype, prefill=policy, threads=threads,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    result = Generation()
    pieces = runner.stream(
        prompt, result, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop or (), chat=chat
    )
    for piece in pieces:
        if not json:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    if json:
        print_json({
            "model": runner.source,
            "allocator": runner.plan.allocator if runner.plan else None,
            "sparsity": runner.plan.sparsity if runner.plan else 0.0,
            "engine": runner.name,
            "engine_reason": runner.reason,
            "prompt": prompt,
            "text": result.text,
            "tokens": len(result.tokens),
            "finish": result.finish,
            "prompt_tokens": result.prompt_tokens,
            "seconds": round(result.prefill_seconds + result.decode_seconds, 3),
            "prefill_seconds": round(result.prefill_seconds, 3),
            "tokens_per_second": round(result.tokens_per_second, 2),
            "dtype": runner.dtype,
        })  # fmt: skip
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    how = f"sparsity {runner.plan.sparsity:g}" if runner.plan else "dense"
    err.print(
        f"[dim]{len(result.tokens)} tokens, {result.tokens_per_second:.1f} tokens/s after a prefill of "
        f"{result.prefill_seconds:.2f} s, {runner.name} engine, {runner.dtype}, {how}[/dim]"
    )
