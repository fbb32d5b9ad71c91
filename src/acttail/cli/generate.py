"""`acttail generate`: continue a prompt, dense or under a plan."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acttail.cli.console import note, print_json
from acttail.cli.dtypes import AnyDtype
from acttail.cli.engines import EngineName, Threads, check_engine, open_engine
from acttail.cli.judge import policy_of, sampling_of
from acttail.cli.lossless import Drafts, Lossless, drafters_of, how_it_runs, made_lossless
from acttail.cli.options import (
    CalibrationText,
    Curves,
    Json,
    Model,
    PlanFile,
    Prefill,
    TrustRemoteCode,
)
from acttail.cli.planning import (
    Allocator,
    MaxKl,
    MaxLoss,
    ReadShare,
    Sparsity,
    Speedup,
    engine_of,
    opened_plan,
    plan_or_request,
)
from acttail.errors import ActTailError

if TYPE_CHECKING:
    from acttail.engine import Generation


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    plan: PlanFile = None,
    sparsity: Sparsity = None,
    read_share: ReadShare = None,
    speedup: Speedup = None,
    max_loss: MaxLoss = None,
    max_kl: MaxKl = None,
    allocator: Allocator = None,
    curves: Curves = None,
    calibration_text: CalibrationText = None,
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
    seed: Annotated[int, typer.Option(help="Seed of the sampling; -1 for another each time.")] = 0,
    engine: EngineName = "auto",
    dtype: AnyDtype = None,
    threads: Threads = None,
    prefill: Prefill = None,
    lossless: Lossless = False,
    drafts: Drafts = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Generate text and say how fast, and which engine ran."""
    from acttail.chat.screen import PlainScreen
    from acttail.engine import Generation
    from acttail.model.opened import open_model

    if not prompt:
        raise ActTailError("the prompt is empty")
    policy = policy_of(prefill)
    drafters = drafters_of(lossless, drafts, engine=engine, prefill=prefill)
    check_engine(engine, dtype, trust_remote_code=trust_remote_code)
    if "" in (stop or ()):
        raise ActTailError("--stop takes a string that is not empty")
    sampling = sampling_of(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    asked = plan_or_request(
        plan, sparsity=sparsity, read_share=read_share, speedup=speedup, max_loss=max_loss, max_kl=max_kl, allocator=allocator, curves=curves,
        text=calibration_text, engine=engine_of(dtype, threads),
    )  # fmt: skip
    opened = open_model(model, trust_remote_code=trust_remote_code)
    runner = open_engine(
        opened, opened_plan(opened, asked), engine=engine, dtype=dtype, prefill=policy, threads=threads,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    result = Generation()
    speaker = made_lossless(runner, drafters)
    pieces = speaker.stream(
        prompt, result, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop or (), chat=chat
    )
    if json:
        for _ in pieces:
            pass
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
            **_drafts(result),
        })  # fmt: skip
        return
    with PlainScreen(sys.stdout) as screen:
        for piece in pieces:
            screen.write(piece.text)
    note(
        f"{len(result.tokens)} tokens, {result.tokens_per_second:.1f} tokens/s after a prefill of "
        f"{result.prefill_seconds:.2f} s, {runner.name} engine, {runner.dtype}, {how_it_runs(runner, speaker)}"
    )
    if result.drafts is not None:
        note(str(result.drafts))


def _drafts(result: "Generation") -> dict[str, Any]:
    """What --json adds of a lossless generation: ``sparsity`` and ``allocator`` are then those of the drafts."""
    if result.drafts is None:
        return {"lossless": False}
    return {"lossless": True, "drafts": result.drafts.to_dict()}
