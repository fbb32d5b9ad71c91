"""`acttail chat`: a conversation in the terminal, or the answer to what is piped in."""

import sys
from typing import Annotated

import typer

from acttail.cli.dtypes import AnyDtype
from acttail.cli.engines import EngineName, Threads, check_engine, open_engine
from acttail.cli.judge import check_of_use, curves_of, option, policy_of, sampling_of
from acttail.cli.lossless import Drafts, Lossless, drafters_of, made_lossless
from acttail.cli.options import CalibrationText, Model, PlanFile, Prefill, TrustRemoteCode
from acttail.cli.planning import (
    Allocator,
    MaxKl,
    MaxLoss,
    ReadShare,
    Speedup,
    engine_of,
    opened_plan,
    plan_or_request,
)
from acttail.errors import ActTailError


def chat(
    model: Model,
    plan: PlanFile = None,
    curves: Annotated[
        str | None,
        typer.Option(help="Sensitivity curves, from which /sparsity makes better plans."),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="To begin with; the plan's by default, else dense.", metavar="S"),
    ] = None,
    read_share: ReadShare = None,
    speedup: Speedup = None,
    max_loss: MaxLoss = None,
    max_kl: MaxKl = None,
    allocator: Allocator = None,
    calibration_text: CalibrationText = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    load: Annotated[
        str | None, typer.Option(help="Go on with a conversation that /save wrote.", metavar="FILE")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer at most.", metavar="N", min=1)
    ] = 2048,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", metavar="T", min=0)] = 0.7,
    top_k: Annotated[
        int, typer.Option(help="Keep the k likeliest tokens; 0 for all.", metavar="K", min=0)
    ] = 0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.", metavar="P", max=1)] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            help="Drop what is less likely than this share of the best.", metavar="P", min=0, max=1
        ),
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 for none.", metavar="R")] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the sampling; another each time without.", metavar="N"),
    ] = None,
    engine: EngineName = "auto",
    dtype: AnyDtype = None,
    threads: Threads = None,
    prefill: Prefill = None,
    lossless: Lossless = False,
    drafts: Drafts = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model in the terminal; /help there lists the commands. Piped input is answered at once."""
    from acttail.chat.conversation import Conversation
    from acttail.chat.session import Session, console_for
    from acttail.chat.transcript import load_messages
    from acttail.maths.budget import check_target
    from acttail.model.opened import open_model

    if sparsity is not None:
        with option("--sparsity"):
            check_target(sparsity)
    policy = policy_of(prefill)
    drafters = drafters_of(lossless, drafts, engine=engine, prefill=prefill)
    sampling = sampling_of(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    found = curves_of(curves)
    # A plan that is given is solved again at the sparsity; what is asked for instead of one is made at it.
    by_plan = plan is not None
    asked = plan_or_request(
        plan, sparsity=None if by_plan else sparsity, read_share=read_share, speedup=speedup, max_loss=max_loss,
        max_kl=max_kl, allocator=allocator,
        text=calibration_text, engine=engine_of(dtype, threads),
        curves=curves if not by_plan and (sparsity, read_share, speedup, max_loss, max_kl) != (None,) * 5 else None,
    )  # fmt: skip
    with option("--load"):
        messages = load_messages(load) if load else []
    check_engine(engine, dtype, trust_remote_code=trust_remote_code)
    typed = sys.stdin.isatty()
    piped = "" if typed else sys.stdin.read().removeprefix("\ufeff")
    if not typed and not piped.strip():
        raise ActTailError("nothing was piped in to answer")
    opened = open_model(model, trust_remote_code=trust_remote_code)
    runner = open_engine(
        opened, opened_plan(opened, asked), engine=engine, dtype=dtype, prefill=policy, threads=threads,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    talk = Conversation(
        runner, curves=found, sampling=sampling, max_new_tokens=max_new_tokens,
        speaker=lambda engine: made_lossless(engine, drafters),
    )  # fmt: skip
    check_of_use(found, talk.fixed)
    talk.resume(messages)
    if system is not None:
        talk.system = system
    if sparsity is not None and by_plan:
        talk.at(sparsity)
    session = Session(talk, runner.source, console_for(), console_for(stderr=True))
    if not typed:
        session.answer(piped.rstrip("\n"))
        return
    from acttail.chat.prompt import Prompt

    session.greet()
    session.loop(Prompt(session.bar))
