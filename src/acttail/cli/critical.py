"""`acttail critical`: how sparse each part of a model may be and keep its score."""

from typing import Annotated

import typer

from acttail.base.dtypes import FAST
from acttail.cli.console import out, print_json
from acttail.cli.dtypes import Dtype
from acttail.cli.judge import check_windows, option, text_of
from acttail.cli.loading import load_model
from acttail.cli.options import Json, Model, TrustRemoteCode, Window
from acttail.cli.progress import work


def critical(
    model: Model,
    text: Annotated[str, typer.Option("--text", help="Text to score.")] = "python-docs:score",
    keep: Annotated[float, typer.Option(help="Share of the dense score to keep.")] = 0.99,
    rule: Annotated[str, typer.Option(help="topk or top-p.")] = "topk",
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use.", min=2)] = 4096,
    window: Window = 1024,
    dtype: Dtype = FAST,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Find the largest sparsity that keeps the score: of the model, each kind, and the FFN's vectors.

    The score is the inverse perplexity. After arXiv 2509.00454.
    """
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
