"""`acttail critical`: how sparse each part of a model may be and keep its score."""

from typing import Annotated

import typer

from acttail.base.dtypes import FAST
from acttail.cli.console import out, print_json
from acttail.cli.dtypes import Dtype
from acttail.cli.judge import check_windows, number_list, option, plan_of, text_of
from acttail.cli.loading import load_model
from acttail.cli.options import Json, Model, TrustRemoteCode, Window
from acttail.cli.progress import work
from acttail.errors import ActTailError


def critical(
    model: Model,
    text: Annotated[str, typer.Option("--text", help="Text to score.")] = "python-docs:score",
    keep: Annotated[float, typer.Option(help="Share of the dense score to keep.")] = 0.99,
    rule: Annotated[str, typer.Option(help="topk or top-p.")] = "topk",
    aggregated: Annotated[
        bool,
        typer.Option(
            "--aggregated",
            help="Instead: what no token of 1, 2, 4 ... 128 in a row reads, under a plan or ReLU.",
        ),
    ] = False,
    reuse: Annotated[
        str | None,
        typer.Option(
            help="Instead: turns of so many tokens, as 4,16, of which every second uses what the one before has loaded.",
            metavar="TOKENS",
        ),
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="Plan file for these two; MODEL's own by default.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use.", min=2)] = 4096,
    window: Window = 1024,
    dtype: Dtype = FAST,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Find the largest sparsity that keeps the score: of the model, each kind, and the FFN's vectors.

    The score is the inverse perplexity. After arXiv 2509.00454.
    """
    if aggregated or reuse is not None:
        _over_tokens(
            model, text, plan, reuse, {"tokens": tokens, "window": window}, dtype, trust_remote_code, json
        )  # fmt: skip
        return
    if plan is not None:
        raise ActTailError("--plan is about --aggregated and --reuse: give one of them too")
    from acttail.evaluate.critical import check_request
    from acttail.evaluate.critical import critical as run

    with option("--keep" if not 0 < keep <= 1 else "--rule"):
        check_request(keep, rule)
    check_windows(window, tokens)
    content = text_of(text)
    lm, tokenizer = load_model(model, dtype, trust_remote_code=trust_remote_code)
    with work("bisecting") as progress:
        found = run(
            lm,
            tokenizer,
            content,
            keep=keep,
            rule=rule,
            tokens=tokens,
            window=window,
            progress=progress,
        )
    if json:
        print_json([c.to_dict() for c in found])
        return
    from rich.table import Table

    table = Table(title=f"critical sparsity at {keep:.0%} of the dense score, {rule}")
    for heading in ("kind", "vector", "sparsity", "score", "dense"):
        table.add_column(heading, justify="left" if heading in ("kind", "vector") else "right")
    for c in found:
        table.add_row(
            c.kind, c.vector or "", f"{c.sparsity:.3f}", f"{c.score:.5f}", f"{c.dense_score:.5f}"
        )
    out.print(table)


def _over_tokens(
    model: str, text: str, plan: str | None, turns: str | None, protocol: dict[str, int], dtype: str,
    trust_remote_code: bool, json: bool,
) -> None:  # fmt: skip
    """What neighbouring tokens share: aggregated sparsity, or with `turns` reuse."""
    from acttail.evaluate.aggregated import aggregated, check_spans, reuse
    from acttail.sparse.apply import sparsify_

    spans: list[int] = []
    if turns is not None:
        with option("--reuse"):
            spans = [int(n) for n in number_list(turns, "--reuse")]
            check_spans(spans)
    check_windows(protocol["window"], protocol["tokens"])
    loaded, content = plan_of(plan), text_of(text)
    lm, tokenizer = load_model(model, dtype, trust_remote_code=trust_remote_code)
    if loaded is not None:
        sparsify_(lm, loaded)
    with work("following tokens") as progress:
        found = (
            reuse(lm, tokenizer, content, spans, progress=progress, **protocol)
            if spans
            else aggregated(lm, tokenizer, content, progress=progress, **protocol)
        )
        rows = [r.to_dict() for r in found]
    if json:
        print_json(rows)
        return
    from rich.table import Table

    title = "reuse of what was loaded, simulated" if spans else "aggregated sparsity"
    table = Table(title=f"{title}: {lm.config.model_type}, {content.name}")
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    out.print(table)
