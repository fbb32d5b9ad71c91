"""`acttail plan`: decide how sparse each projection may be."""

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acttail.base.dtypes import FAST
from acttail.cli.console import out, print_json, say
from acttail.cli.diff import diff
from acttail.cli.dtypes import Dtype
from acttail.cli.judge import (
    check_outputs,
    head_of,
    option,
)
from acttail.cli.options import (
    CalibrationText,
    CalibrationTokens,
    Curves,
    DeviceMap,
    Head,
    Json,
    MaxMemory,
    NoHead,
    Set,
)
from acttail.cli.planning import AUTO, ReadShare, Speedup, engine_of, opened_plan, request_of
from acttail.errors import ActTailError

if TYPE_CHECKING:
    from acttail.plan import SparsityPlan


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Hub id, folder (converted ones too), GGUF file, or smollm2-135m.", metavar="MODEL"
        ),
    ],
    others: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[A B]",
            help="The word diff and two plan files compare the plans; diff alone is a model.",
        ),
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Model sparsity, 0 to 0.99.")] = None,
    read_share: ReadShare = None,
    speedup: Speedup = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="Instead: most the loss may rise, nats per token, on held-out text."),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Instead: most KL to the dense model, nats per token.")
    ] = None,
    allocator: Annotated[
        str | None, typer.Option(help="The rule that makes the budget; acttail by default.")
    ] = None,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto",
            help="Instead: try those that need nothing which is not given on the model, and take the best.",
        ),
    ] = False,
    rule: Annotated[
        str | None, typer.Option(help="Which entries stay: topk, wina, threshold or teal.")
    ] = None,
    set_: Set = None,
    head: Head = False,
    no_head: NoHead = False,
    from_: Annotated[
        str | None, typer.Option("--from", help="JSON {projection: sparsity} made elsewhere.")
    ] = None,
    calibration_text: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 4096,
    curves: Curves = None,
    dtype: Dtype = FAST,
    engine_dtype: Annotated[
        str,
        typer.Option(
            help="Weights whose bytes or time --read-share and --speedup count: auto, fp32, bf16, int8, int4."
        ),
    ] = "auto",
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Measure curves on Ray: auto, local, or an address."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the plan here.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a plan: one sparsity per projection that together meet the requested model sparsity.

    `acttail plan diff A B` shows two plans side by side.
    """
    from acttail.model.opened import open_model

    if model == "diff" and others is not None and len(others) == 2:
        diff(*others, json=json)
        return
    if others:
        also = "; diff takes two plan files" if model == "diff" else ""
        raise ActTailError(f"plan takes one MODEL, got {model} and {' '.join(others)}{also}")
    by_quality = max_loss is not None or max_kl is not None
    own_budget = any(v is not None for v in (sparsity, read_share, speedup))
    if sum((from_ is not None, by_quality, own_budget and from_ is None)) > 1:
        raise ActTailError(
            "give one of --sparsity, --read-share, --speedup, --max-loss, --max-kl and --from"
        )
    if auto and allocator is not None:
        raise ActTailError("give one of --auto and --allocator")
    if auto:
        allocator = AUTO
    check_outputs(output)
    in_budget = head_of(head, no_head)
    if from_ is not None:
        if in_budget is not None:
            raise ActTailError("--from says itself whether the head is sparse: leave out --head")
        _check_from({
            "--allocator": allocator, "--rule": rule, "--set": set_, "--curves": curves,
            "--calibration-text": calibration_text, "--read-share": read_share, "--speedup": speedup, "--device-map": device_map, "--max-memory": max_memory, "--ray": ray,
        })  # fmt: skip
    if from_ is not None:
        made = _from_file(model, from_, sparsity)
    else:
        if not own_budget and not by_quality:
            raise ActTailError(
                "plan needs --sparsity (or --read-share, --speedup, --max-loss, --max-kl, --from)"
            )
        with option("--engine-dtype"):
            engine = engine_of(engine_dtype)
        request = request_of(
            sparsity=sparsity, read_share=read_share, speedup=speedup, engine=engine, max_loss=max_loss, max_kl=max_kl, allocator=allocator, rule=rule, head=in_budget,
            pairs=set_, curves=curves, text=calibration_text, tokens=calibration_tokens, dtype=dtype,
            device_map=device_map, max_memory=max_memory, ray=ray,
        )  # fmt: skip
        found = opened_plan(open_model(model), request, fresh=True)
        assert found is not None  # noqa: S101
        made = found
    if output:
        made.save(output)
    if json:
        print_json(made.to_dict())
    else:
        _print_plan(made)
        say(f"written to {output}" if output else "not saved: give -o plan.json to keep it")


def _from_file(model: str, path: str, sparsity: float | None) -> "SparsityPlan":
    from acttail.allocate.given import plan_from_sparsities, read_sparsities
    from acttail.model.opened import as_weights

    with option("--from"):
        given = read_sparsities(path)
    return plan_from_sparsities(as_weights(model), given, name=Path(path).name, sparsity=sparsity)


def _check_from(others: dict[str, Any]) -> None:
    """Refuse what makes a budget beside a file that holds one."""
    asked = [name for name, value in others.items() if value]
    if asked:
        raise ActTailError(f"--from holds the sparsities already: leave out {', '.join(asked)}")


def _print_plan(made: "SparsityPlan") -> None:
    from rich.table import Table

    from acttail.report.difference import sparsities_by_kind
    from acttail.report.heatmap import grid, terminal

    say(f"{made.model}: {made.allocator}, sparsity {made.sparsity:.4g}", style="bold")
    table = Table()
    for heading in ("kind", "count", "mean", "lowest", "highest"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind, values in sparsities_by_kind(made).items():
        table.add_row(
            kind, str(len(values)), f"{fmean(values):.3f}", f"{min(values):.3f}", f"{max(values):.3f}"
        )  # fmt: skip
    out.print(table)
    cells = [(e.kind, e.block, e.realised_sparsity) for e in made.projections.values()]
    out.print(terminal(grid(cells), title="sparsity"))
    arguments = ", ".join(f"{key}={value}" for key, value in made.arguments.items()) or "none"
    say(f"arguments: {arguments}")
    if made.head is None:
        say("the output head is dense, and not in the budget")
    else:
        name, entry = made.head
        share = entry.cost / sum(e.cost for e in made.projections.values())
        say(
            f"the output head {name}, {share:.0%} of the budget, keeps {entry.k} of {entry.d_in} inputs"
        )
    for what, said in made.notes.items():
        say(f"{what}: {said}")
    say(f"realised after rounding to whole entries: {made.realised_sparsity:.4f}")
