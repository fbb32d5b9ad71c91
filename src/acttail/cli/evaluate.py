"""`acttail eval`: perplexity and tasks of a model, dense or under a plan."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acttail.base.dtypes import FAST
from acttail.cli.console import out, print_json, say, with_error
from acttail.cli.dtypes import AnyDtype
from acttail.cli.engines import check_engine, open_engine
from acttail.cli.judge import (
    check_outputs,
    check_spread,
    check_windows,
    metrics_of,
    names,
    option,
    plan_of,
    policy_of,
    text_of,
)
from acttail.cli.loading import load_model
from acttail.cli.options import (
    TEXT_HELP,
    DeviceMap,
    Json,
    MaxMemory,
    Metrics,
    Model,
    PlanFile,
    Prefill,
    Stride,
    Tokens,
    TrustRemoteCode,
    Window,
)
from acttail.cli.progress import work
from acttail.errors import ActTailError

if TYPE_CHECKING:
    from acttail.calibrate.text import Text
    from acttail.plan import SparsityPlan
    from acttail.sparse.policy import PrefillPolicy


def evaluate(
    model: Model,
    text: Annotated[str | None, typer.Option("--text", help=TEXT_HELP)] = None,
    plan: PlanFile = None,
    tokens: Tokens = None,
    window: Window = 1024,
    stride: Stride = None,
    engine: Annotated[
        str,
        typer.Option(help="transformers, or native: the numbers of the kernels that decode."),
    ] = "transformers",
    dtype: AnyDtype = None,
    prefill: Prefill = None,
    metrics: Metrics = "perplexity",
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated lm-eval tasks, zero-shot.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items per task.", min=1)] = None,
    task_data: Annotated[
        str | None, typer.Option(help="Folder with the tasks' data; the Hub without one.")
    ] = None,
    save_nll: Annotated[
        str | None, typer.Option(help="Write the per-token losses here (.npy or .safetensors).")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of anything random; recorded.", min=0, max=2**32 - 1)
    ] = 0,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Measure perplexity with its standard error, and what was realised of the plan."""
    import torch

    from acttail.base.files import check_ending
    from acttail.evaluate.record import NLL_ENDINGS

    policy = policy_of(prefill)
    wanted = metrics_of(metrics)
    if text is None and tasks is None:
        raise ActTailError("eval needs --text, --tasks, or both")
    if save_nll is not None:
        with option("--save-nll"):
            check_ending(save_nll, NLL_ENDINGS, "a table of losses")
        if text is None:
            raise ActTailError("--save-nll writes the losses on a text: give --text")
    check_outputs(None, save_nll=save_nll)
    check_windows(window, tokens, stride)
    given = names(tasks, "--tasks") if tasks is not None else []
    if not given and (limit is not None or task_data is not None):
        raise ActTailError("--limit and --task-data are about tasks: give --tasks")
    native = check_engine(engine, dtype, trust_remote_code=trust_remote_code)
    if engine == "transformers":
        check_spread(device_map, max_memory)
    elif not native:
        raise ActTailError(f"the native engine does not score {dtype}: use --engine transformers")
    else:
        _check_native(policy, [*given, device_map, max_memory])
    if given:
        from acttail.evaluate.tasks import check_tasks

        with option("--tasks"):
            check_tasks(given, task_data)
    asked = _Asked(
        model, plan_of(plan), text_of(text) if text is not None else None,
        dtype, prefill, {"window": window, "tokens": tokens, "stride": stride, "metrics": wanted}, save_nll,
    )  # fmt: skip
    if engine != "transformers" and asked.content is not None:
        row = _on_native(asked, asked.content, engine)
    else:
        torch.manual_seed(seed)
        row = _on_transformers(
            asked, given, {"limit": limit, "data": task_data, "seed": seed}, device_map=device_map,
            max_memory=max_memory, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        row["seed"] = seed
    if json:
        print_json(row)
    else:
        _print(row)


def _check_native(policy: "PrefillPolicy | None", others: list[str | None]) -> None:
    """Judge what the native engine is asked for; `others` is what only transformers does."""
    from acttail.evaluate.native import check_policy

    if policy is not None:
        check_policy(policy)
    if any(other is not None for other in others):
        raise ActTailError(
            "the native engine is scored on --text alone; tasks and device maps are for transformers"
        )


@dataclass(frozen=True)
class _Asked:
    """What is to be scored; `protocol` holds the window, tokens, stride and metrics."""

    model: str
    plan: "SparsityPlan | None"
    content: "Text | None"
    dtype: str | None
    prefill: str | None
    protocol: dict[str, Any]
    save_nll: str | None


def _on_transformers(
    asked: _Asked, tasks: list[str], tasks_from: dict[str, Any], **loading: Any
) -> dict[str, Any]:
    from acttail.evaluate.perplexity import perplexity
    from acttail.evaluate.record import identity, record, save_token_nll
    from acttail.sparse.apply import sparsify_
    from acttail.sparse.policy import PrefillPolicy

    lm, tokenizer = load_model(asked.model, asked.dtype or FAST, **loading)
    if asked.plan is not None:
        sparsify_(lm, asked.plan, prefill=PrefillPolicy.choose(asked.prefill))
    row: dict[str, Any] = {}
    if asked.content is not None:
        with work("evaluating") as progress:
            result = perplexity(
                lm, tokenizer, asked.content, prefill=asked.prefill, progress=progress, **asked.protocol
            )  # fmt: skip
        if asked.save_nll:
            save_token_nll(asked.save_nll, result)
        row = record(lm, result)
    if tasks:
        from acttail.evaluate.tasks import evaluate_tasks

        with work("scoring tasks"):
            found = evaluate_tasks(lm, tokenizer, tasks, **tasks_from)
        row = (row or identity(lm)) | {"tasks": {r.task: r.to_dict() for r in found}}
    return row


def _on_native(asked: _Asked, content: "Text", engine: str) -> dict[str, Any]:
    from acttail.engine import NativeEngine
    from acttail.evaluate.native import native_perplexity
    from acttail.evaluate.record import native_record, save_token_nll

    found = open_engine(
        asked.model, asked.plan, engine=engine, dtype=asked.dtype, prefill=policy_of(asked.prefill)
    )
    if not isinstance(found, NativeEngine):
        raise ActTailError(f"{found.reason}; use --engine transformers")
    with work("evaluating") as progress:
        result = native_perplexity(found, content, progress=progress, **asked.protocol)
    if asked.save_nll:
        save_token_nll(asked.save_nll, result)
    return native_record(found, result)


def _print(row: dict[str, Any]) -> None:
    for task, scores in row.get("tasks", {}).items():
        shown = ", ".join(
            f"{m} {s['value']:.4f}" + (f" ± {s['stderr']:.4f}" if s["stderr"] is not None else "")
            for m, s in scores["metrics"].items()
        )
        say(f"{task}: {shown} ({scores['n']} items)")
    if "perplexity" in row:
        _print_perplexity(row)


def _print_perplexity(row: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False, title=row["model"])
    table.add_column(style="dim")
    table.add_column()
    table.add_row("perplexity", with_error(row["perplexity"], row["perplexity_stderr"]))
    if row["kl"] is not None:
        error = row["kl_stderr"] or 0
        table.add_row("KL to dense", f"{row['kl']:.4f} ± {error:.4f} nats per token")
        table.add_row("top-1 agreement", f"{row['top1']:.4f} ± {row['top1_stderr'] or 0:.4f}")
    name = row["allocator"]
    table.add_row("plan", f"{name}, sparsity {row['sparsity']:g}" if name else "dense")
    if row["realised_sparsity"]:
        table.add_row("realised sparsity", f"{row['realised_sparsity']:.4f}")
    sparse, dense = (row["bytes_per_token"][key] / 1e6 for key in ("sparse", "dense"))
    table.add_row("bytes per token", f"{sparse:,.1f} MB of {dense:,.1f} MB dense")
    scored = f"{row['scored']:,} tokens scored in {row['windows']} windows of {row['window']}"
    table.add_row("text", f"{row['text']}, {scored}")
    table.add_row(
        "protocol",
        f"{row.get('engine', 'transformers')}, {row['dtype']}, prefill {row['prefill']}, "
        f"BOS {'added' if row['bos'] else 'not added'}",
    )
    table.add_row("seconds", f"{row['seconds']:.1f}")
    out.print(table)
