"""`acttail plan`: decide how sparse each projection may be; `acttail plan diff A B`."""

import json as json_module
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from acttail.cli.common import (
    CalibrationText,
    CalibrationTokens,
    DeviceMap,
    Dtype,
    Json,
    MaxMemory,
    Set,
    calibration_for,
    err,
    load_model,
    out,
    print_json,
    read_calibration_text,
    settings,
    work,
)
from acttail.errors import ActTailError, PlanError


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Hub id, folder, GGUF file, or smollm2-135m; or the word diff.", metavar="MODEL"
        ),
    ],
    others: Annotated[
        list[str] | None, typer.Argument(metavar="[A B]", help="After diff: two plan files.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Model sparsity, 0 to 0.99.")] = None,
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
    rule: Annotated[
        str | None, typer.Option(help="Which entries stay: topk, wina or threshold.")
    ] = None,
    set_: Set = None,
    from_: Annotated[
        str | None, typer.Option("--from", help="JSON {projection: sparsity} made elsewhere.")
    ] = None,
    calibration_text: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 4096,
    curves: Annotated[
        str | None,
        typer.Option(help="File of sensitivity curves: read if it is there, else written."),
    ] = None,
    dtype: Dtype = "bfloat16",
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the plan here.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a plan: one sparsity per projection that together meet the requested model sparsity.

    `acttail plan diff A B` shows two plans side by side.
    """
    if model == "diff":
        if len(others or []) != 2:
            raise ActTailError("plan diff takes two plan files")
        _diff(*(others or []), json=json)
        return
    if others:
        raise ActTailError(f"plan takes one MODEL, got {model} and {' '.join(others)}")
    by_quality = max_loss is not None or max_kl is not None
    request = _Request(
        model, allocator or ("sensitivity" if by_quality else "acttail"), rule,
        settings(set_) | ({"curves": curves} if curves else {}),
        calibration_text, calibration_tokens, dtype, device_map, max_memory,
    )  # fmt: skip
    if sum((from_ is not None, by_quality, sparsity is not None and from_ is None)) > 1:
        raise ActTailError("give one of --sparsity, --max-loss, --max-kl and --from")
    if from_ is not None:
        made = _from_file(model, from_, sparsity)
    elif by_quality:
        made = _for_quality(request, max_loss, max_kl)
    else:
        if sparsity is None:
            raise ActTailError("plan needs --sparsity (or --max-loss, --max-kl, --from)")
        made = _make(request, sparsity)
    if output:
        made.save(output)
    if json:
        print_json(made.to_dict())
    else:
        _print_plan(made)
        out.print(f"written to {output}" if output else "not saved: give -o plan.json to keep it")


@dataclass(frozen=True)
class _Request:
    """What was asked for on the command line."""

    model: str
    allocator: str
    rule: str | None
    arguments: dict[str, str]
    text: str | None
    tokens: int
    dtype: str
    device_map: str | None
    max_memory: str | None

    @property
    def calibrated(self) -> bool:
        """Whether the model must be loaded and shown text."""
        from acttail.allocate import get

        allocation = get(self.allocator)
        allocation.arguments(self.arguments)
        if (self.rule or allocation.rule) in ("threshold", "teal"):
            return True
        # With the curves on disk another sparsity costs neither text nor a pass of the model.
        curves = self.arguments.get("curves")
        return allocation.needs_text and not (curves and Path(curves).exists())


@contextmanager
def _calibrated(request: _Request) -> Iterator[Any]:
    """An AllocationContext with a loaded model and calibration text."""
    from acttail.allocate import AllocationContext
    from acttail.checkpoint import LoadedWeights

    content = read_calibration_text(request.text, needed=True)
    lm, tokenizer = load_model(
        request.model, request.dtype, device_map=request.device_map, max_memory=request.max_memory
    )
    with work("calibrating") as progress:
        calibration = calibration_for(lm, tokenizer, content, request.tokens, progress)
        yield AllocationContext(LoadedWeights(lm), progress=progress, calibration=calibration)


def _make(request: _Request, sparsity: float) -> Any:
    from acttail.allocate import make_plan
    from acttail.analysis import as_weights
    from acttail.budget import check_target

    check_target(sparsity)
    arguments: dict[str, Any] = {
        "allocator": request.allocator, "arguments": request.arguments, "rule": request.rule,
    }  # fmt: skip
    if request.calibrated:
        with _calibrated(request) as context:
            return make_plan(None, sparsity, context=context, **arguments)
    with work("planning") as progress:
        return make_plan(as_weights(request.model), sparsity, progress=progress, **arguments)


def _for_quality(request: _Request, max_loss: float | None, max_kl: float | None) -> Any:
    from acttail.allocate import get
    from acttail.quality import plan_for_quality

    get(request.allocator).arguments(request.arguments)
    limit = max_loss if max_loss is not None else max_kl
    if limit is None or (max_loss is not None and max_kl is not None):
        raise ActTailError("give one of --max-loss and --max-kl")
    with _calibrated(request) as context:
        found = plan_for_quality(
            context, limit, metric="loss" if max_loss is not None else "kl",
            allocator=request.allocator, arguments=request.arguments, rule=request.rule,
        )  # fmt: skip
    what = "loss rises by" if max_loss is not None else "KL to dense is"
    err.print(
        f"sparsity {found.plan.sparsity:.3f}: on held-out calibration text the {what} "
        f"{found.measured:.4f} nats per token (limit {limit:g}, predicted KL {found.predicted:.4f})"
    )
    return found.plan


def _from_file(model: str, path: str, sparsity: float | None) -> Any:
    from acttail.analysis import as_weights
    from acttail.plan import build_plan

    try:
        given = json_module.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise PlanError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(given, dict):
        raise PlanError(f"{path} must hold one object {{projection: sparsity}}")
    made = build_plan(
        as_weights(model),
        given,
        sparsity=None,
        allocator="from-file",
        arguments={"from": Path(path).name},
    )
    if sparsity is not None and abs(made.solved_sparsity - sparsity) > 1e-3:
        raise PlanError(
            f"the sparsities in {path} average {made.solved_sparsity:.4f}, not the requested {sparsity}"
        )
    return made


def _by_kind(made: Any) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for entry in made.projections.values():
        groups[entry.kind].append(entry)
    return groups


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _print_plan(made: Any) -> None:
    from rich.table import Table

    out.print(f"{made.model}: {made.allocator}, sparsity {made.sparsity:g}", style="bold")
    table = Table()
    for heading in ("kind", "count", "mean", "lowest", "highest"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind, entries in _by_kind(made).items():
        values = [e.sparsity for e in entries]
        table.add_row(
            kind,
            str(len(values)),
            f"{_mean(values):.3f}",
            f"{min(values):.3f}",
            f"{max(values):.3f}",
        )
    out.print(table)
    from acttail.report.heatmap import grid, terminal

    cells = [(e.kind, e.block, e.realised_sparsity) for e in made.projections.values()]
    out.print(terminal(grid(cells), title="sparsity"))
    arguments = ", ".join(f"{key}={value}" for key, value in made.arguments.items()) or "none"
    out.print(f"arguments: {arguments}")
    out.print(f"realised after rounding to whole entries: {made.realised_sparsity:.4f}")


def _diff(a: str, b: str, *, json: bool) -> None:
    from acttail.plan import SparsityPlan

    left, right = SparsityPlan.load(a), SparsityPlan.load(b)
    if left.fingerprint != right.fingerprint:
        only = sorted(set(left.projections) ^ set(right.projections))
        what = f"only one has {only[0]}" if only else "their shapes differ"
        raise PlanError(f"{a} and {b} are for different models: {what}")
    records: list[dict[str, Any]] = [
        {
            "projection": name, "a": entry.sparsity, "b": right.projections[name].sparsity,
            "difference": round(right.projections[name].sparsity - entry.sparsity, 9),
        }
        for name, entry in left.projections.items()
    ]  # fmt: skip
    if json:
        print_json(records)
        return
    from rich.table import Table

    table = Table(title=f"A = {a}, B = {b}")
    for heading in ("", "A", "B", "B − A"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("allocator", left.allocator, right.allocator, "")
    table.add_row(
        "requested",
        f"{left.sparsity:.3f}",
        f"{right.sparsity:.3f}",
        f"{right.sparsity - left.sparsity:+.3f}",
    )
    difference = right.realised_sparsity - left.realised_sparsity
    table.add_row(
        "realised",
        f"{left.realised_sparsity:.4f}",
        f"{right.realised_sparsity:.4f}",
        f"{difference:+.4f}",
    )
    kinds = _by_kind(right)
    for kind, entries in _by_kind(left).items():
        x, y = _mean([e.sparsity for e in entries]), _mean([e.sparsity for e in kinds[kind]])
        table.add_row(f"mean {kind}", f"{x:.3f}", f"{y:.3f}", f"{y - x:+.3f}")
    table.add_section()
    for record in sorted(records, key=lambda r: -abs(r["difference"]))[:20]:
        table.add_row(
            record["projection"],
            f"{record['a']:.3f}",
            f"{record['b']:.3f}",
            f"{record['difference']:+.3f}",
        )
    out.print(table)
    if len(records) > 20:
        out.print(f"the 20 largest differences of {len(records)} are shown; --json prints all")
