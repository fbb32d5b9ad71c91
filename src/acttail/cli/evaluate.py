"""`acttail eval`: perplexity of a model, dense or under a plan."""

from typing import Annotated, Any

import typer

from acttail.cli.common import (
    DeviceMap,
    Dtype,
    Json,
    MaxMemory,
    Metrics,
    Model,
    Prefill,
    Stride,
    Tokens,
    TrustRemoteCode,
    Window,
    load_model,
    names,
    out,
    print_json,
    with_error,
    work,
)
from acttail.errors import ActTailError


def evaluate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", help="File, folder, python-docs:score, or hf:DATASET[/CONFIG][:SPLIT]."
        ),
    ] = None,
    plan: Annotated[str | None, typer.Option(help="Plan file; dense without one.")] = None,
    tokens: Tokens = None,
    window: Window = 1024,
    stride: Stride = None,
    engine: Annotated[
        str,
        typer.Option(help="transformers, or native: the numbers of the kernels that decode."),
    ] = "transformers",
    dtype: Dtype = "bfloat16",
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
    seed: Annotated[int, typer.Option(help="Seed of anything random; recorded.")] = 0,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Measure perplexity with its standard error, and what was realised of the plan."""
    import torch

    from acttail.evaluate.perplexity import perplexity
    from acttail.evaluate.record import identity, record, save_token_nll
    from acttail.plan import SparsityPlan
    from acttail.prefill import PrefillPolicy
    from acttail.sparsify import sparsify_
    from acttail.text import read_text

    policy = PrefillPolicy.parse(prefill or "all")
    loaded_plan = SparsityPlan.load(plan) if plan else None
    if text is None and tasks is None:
        raise ActTailError("eval needs --text, --tasks, or both")
    content = read_text(text) if text is not None else None
    if engine != "transformers":
        _native(
            model, loaded_plan, content, engine, dtype, policy, window, tokens, stride, names(metrics), tasks,
            save_nll, json=json,
        )  # fmt: skip
        return
    torch.manual_seed(seed)
    lm, tokenizer = load_model(
        model,
        dtype,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
        max_memory=max_memory,
    )
    if loaded_plan is not None:
        sparsify_(lm, loaded_plan, prefill=policy)
    row: dict[str, Any] = {}
    if content is not None:
        with work("evaluating") as progress:
            result = perplexity(
                lm, tokenizer, content, window=window, tokens=tokens, stride=stride,
                prefill=prefill, metrics=names(metrics), progress=progress,
            )  # fmt: skip
        if save_nll:
            save_token_nll(save_nll, result)
        row = record(lm, result)
    if tasks is not None:
        scores = _tasks(lm, tokenizer, names(tasks), limit, task_data, seed)
        row = (row or identity(lm)) | {"tasks": scores}
    row["seed"] = seed
    if json:
        print_json(row)
    else:
        _print(row)


def _native(
    model: str, plan: Any, content: Any, engine: str, dtype: str, policy: Any, window: int,
    tokens: int | None, stride: int | None, metrics: list[str], tasks: str | None, save_nll: str | None,
    *, json: bool,
) -> None:  # fmt: skip
    from acttail.cli.engines import open_engine
    from acttail.engine import NativeEngine
    from acttail.evaluate.native import native_perplexity
    from acttail.evaluate.record import native_record, save_token_nll

    if content is None or tasks is not None:
        raise ActTailError("the native engine is scored on --text; tasks run on transformers")
    found = open_engine(model, plan, engine=engine, dtype=dtype, prefill=policy)
    if not isinstance(found, NativeEngine):
        raise ActTailError(f"{found.reason}; use --engine transformers")
    with work("evaluating") as progress:
        result = native_perplexity(
            found,
            content,
            window=window,
            tokens=tokens,
            stride=stride,
            metrics=metrics,
            progress=progress,
        )
    if save_nll:
        save_token_nll(save_nll, result)
    row = native_record(found, result)
    if json:
        print_json(row)
    else:
        _print(row)


def _tasks(
    lm: Any, tokenizer: Any, tasks: list[str], limit: int | None, data: str | None, seed: int
) -> dict[str, Any]:
    from acttail.evaluate.tasks import evaluate_tasks

    found = evaluate_tasks(lm, tokenizer, tasks, limit=limit, data=data, seed=seed)
    return {
        r.task: {
            "metrics": {m: {"value": v, "stderr": e} for m, (v, e) in r.metrics.items()},
            "n": len(r.items), "items": r.items,
        }
        for r in found
    }  # fmt: skip


def _print(row: dict[str, Any]) -> None:
    for task, scores in row.get("tasks", {}).items():
        shown = ", ".join(
            f"{m} {s['value']:.4f}" + (f" ± {s['stderr']:.4f}" if s["stderr"] is not None else "")
            for m, s in scores["metrics"].items()
        )
        out.print(f"{task}: {shown} ({scores['n']} items)")
    if "perplexity" in row:
        _print_perplexity(row)


def _print_perplexity(row: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False, title=row["model"])
    table.add_column(style="dim")
    table.add_column()
    table.add_row("perplexity", with_error(row["perplexity"], row["perplexity_stderr"]))
    if row["kl"] is not None:
        table.add_row(
            "KL to dense", f"{row['kl']:.4f} ± {row['kl_stderr'] or 0:.4f} nats per token"
        )
        table.add_row("top-1 agreement", f"{row['top1']:.4f} ± {row['top1_stderr'] or 0:.4f}")
    allocator = row["allocator"] or "dense"
    table.add_row(
        "plan",
        allocator if row["allocator"] is None else f"{allocator}, sparsity {row['sparsity']:g}",
    )
    if row["realised_sparsity"]:
        table.add_row("realised sparsity", f"{row['realised_sparsity']:.4f}")
    traffic = row["bytes_per_token"]
    table.add_row(
        "bytes per token",
        f"{traffic['sparse'] / 1e6:,.1f} MB of {traffic['dense'] / 1e6:,.1f} MB dense",
    )
    table.add_row(
        "text",
        f"{row['text']}, {row['scored']:,} tokens scored in {row['windows']} windows of {row['window']}",
    )
    table.add_row(
        "protocol",
        f"{row.get('engine', 'transformers')}, {row['dtype']}, prefill {row['prefill']}, BOS {'added' if row['bos'] else 'not added'}",
    )
    table.add_row("seconds", f"{row['seconds']:.1f}")
    out.print(table)
