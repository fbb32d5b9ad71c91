"""`acttail adapt`: a short self-distillation under a plan."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acttail.cli.console import note, print_json, say
from acttail.cli.dtypes import Dtype
from acttail.cli.judge import check_device, check_output_folder, names, option, text_of
from acttail.cli.loading import load_model
from acttail.cli.options import Json, Model
from acttail.cli.progress import work
from acttail.errors import ActTailError, TextError

if TYPE_CHECKING:
    from acttail.adapt.relu import Relu
    from acttail.adapt.run import Adapted
    from acttail.adapt.settings import Settings


def adapt(
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", help="Folder to write.")],
    plan: Annotated[
        str | None, typer.Option(help="Plan file that the model is adapted to.")
    ] = None,
    relu: Annotated[
        str | None,
        typer.Option(
            help="Or put ReLU in: stage1 (the MLP's activation), stage2 (after the norms, too) or shifted.",
            metavar="STAGE",
        ),
    ] = None,
    zeros: Annotated[
        float | None,
        typer.Option(
            help="Share of the MLP's features that --relu shifted silences; 0.9 by default."
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to train on, never one that is scored; may be repeated."),
    ] = None,
    self_: Annotated[
        bool, typer.Option("--self", help="Train on text sampled from the model itself, too.")
    ] = False,
    train: Annotated[
        str, typer.Option(help="bias, norm, lora or all; or some, as lora,norm,bias.")
    ] = "lora,norm",
    minutes: Annotated[
        float | None, typer.Option(help="Minutes of training and validation; 10 by default.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps instead, for a run that can be repeated exactly.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of each text to use; of --self, to sample (32768).", min=2),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 4,
    rank: Annotated[int, typer.Option(help="Rank of lora.")] = 16,
    learning_rate: Annotated[
        float, typer.Option(help="Factor of the learning rates, which suit what is trained.")
    ] = 1.0,
    held_out: Annotated[
        int, typer.Option(help="Tokens of the text that validate and are not trained on.")
    ] = 4096,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    dtype: Dtype = "auto",
    device: Annotated[
        str,
        typer.Option(help="Where to train: auto (an accelerator if there is one), cpu, cuda:0."),
    ] = "auto",
    json: Json = False,
) -> None:
    """Train a little of a model so that it says under a plan, or with ReLU, what it said without.

    A short distillation of the dense model into itself made sparse. Writes a folder that everything loads, the
    plan inside; never a worse model than the one it began with. A run that was stopped goes on when it is
    started again.
    """
    from acttail.adapt.parts import check_rule
    from acttail.plan import SparsityPlan

    swap = _relu(relu, zeros)
    if (plan is None) == (swap is None):
        raise ActTailError("adapt needs --plan FILE or --relu STAGE, one of the two")

    settings = _settings(
        train=tuple(names(train, "--train")), minutes=10.0 if minutes is None and steps is None else minutes, steps=steps,
        window=window, batch=batch, rank=rank, learning_rate=learning_rate, held_out=held_out, seed=seed,
    )  # fmt: skip
    if not text and not self_:
        raise TextError("adapt needs a text to train on: give --text FILE (or --self)")
    with option("--device"):
        where = check_device(device)
    check_output_folder(output)
    if Path(output).exists() and Path(model).exists() and Path(output).samefile(model):
        raise ActTailError(f"--output: {output} is the model itself; give another folder")
    loaded = None
    if plan is not None:
        with option("--plan"):
            loaded = SparsityPlan.load(plan)
        with option("--train"):
            check_rule(settings.train, loaded)
    texts = [text_of(name) for name in text or ()]
    lm, tokenizer = load_model(model, dtype, device=where)
    _run(lm, tokenizer, loaded, swap, texts, settings, tokens, output, self_, json)


def _relu(stage: str | None, zeros: float | None) -> "Relu | None":
    """Judge --relu and --zeros."""
    if stage is None:
        if zeros is not None:
            raise ActTailError("--zeros is about --relu shifted: give that, or leave it out")
        return None
    from acttail.adapt.relu import Relu

    with option("--relu" if zeros is None else "--zeros"):
        return Relu(stage, zeros)


def _settings(**asked: Any) -> "Settings":
    from acttail.adapt import settings as judged

    for name in judged.CHECKS.keys() & asked.keys():
        with option(f"--{name.replace('_', '-')}"):
            judged.check(name, asked[name])
    if asked["minutes"] is not None and asked["steps"] is not None:
        raise ActTailError("give one of --minutes and --steps")
    with option("--held-out"):
        return judged.Settings(**asked)


def _run(
    lm: Any, tokenizer: Any, plan: Any, swap: "Relu | None", texts: list[Any], settings: "Settings", tokens: int | None,
    output: str, self_: bool, json: bool,
) -> None:  # fmt: skip
    from acttail.adapt.data import sampled
    from acttail.adapt.precision import autocast_for
    from acttail.adapt.run import adapt as distil
    from acttail.share import hub

    if self_:
        with work("sampling text from the model") as progress:
            texts.append(
                sampled(lm, tokenizer, tokens=tokens, seed=settings.seed, progress=progress)
            )
    with work("adapting") as progress:
        done = distil(
            lm, tokenizer, plan, texts, settings, relu=swap, tokens=tokens, autocast=autocast_for(lm.device),
            progress=progress, remark=note,
        )  # fmt: skip
    hub.save(lm, tokenizer, output)
    if json:
        print_json({**asdict(done), "plan": done.plan.to_dict(), "folder": output})
        return
    _print(done, output)


def _print(done: "Adapted", output: str) -> None:
    if done.improved:
        say(
            f"KL to the dense model on {done.held_out} held-out tokens: {done.kl_before:.4f} before, "
            f"{done.kl_after:.4f} after"
        )
    else:
        say(
            f"no better than before on {done.held_out} held-out tokens (KL {done.kl_before:.4f}): "
            "the weights are the original ones"
        )
    say(
        f"{done.steps} steps, {done.tokens} tokens, {done.seconds:.0f} s ({done.cpu_seconds:.0f} s of processors), "
        f"{done.parameters:,} numbers trained"
    )
    if done.plan.exact:
        kinds: dict[str, list[float]] = {}
        for entry in done.plan.projections.values():
            if entry.threshold is not None:
                kinds.setdefault(entry.kind, []).append(entry.realised_sparsity)
        shown = ", ".join(f"{kind} {sum(v) / len(v):.3f}" for kind, v in kinds.items())
        say(
            f"exact zeros on held-out tokens: {done.plan.realised_sparsity:.4f} of the weights need not be read "
            f"(of the inputs of {shown}); what the ReLU model says does not depend on the plan"
        )
    say(f"saved to {output}; transformers loads it after `import acttail`")
