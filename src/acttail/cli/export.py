"""`acttail export` and `acttail save`: plans for other projects, models for Hugging Face."""

from pathlib import Path
from typing import Annotated

import typer

from acttail.cli.console import say
from acttail.cli.dtypes import Dtype
from acttail.cli.judge import check_output_folder, option, policy_of
from acttail.cli.loading import load_model
from acttail.cli.options import Model, Prefill, TrustRemoteCode
from acttail.errors import ActTailError


def export(
    plan: Annotated[str, typer.Argument(help="Plan file.", metavar="PLAN")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder to write into.")],
    format_: Annotated[
        str, typer.Option("--format", help="plain (JSON), teal (lookup folder), nncf (target map).")
    ] = "plain",
) -> None:
    """Write a plan in the form of another project."""
    from acttail.plan import SparsityPlan
    from acttail.share.export import FORMATS

    if format_ not in FORMATS:
        raise ActTailError(f"unknown format {format_!r}: use {', '.join(FORMATS)}")
    loaded = SparsityPlan.load(plan)
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ActTailError(f"cannot make the folder {folder}: {error.strerror}") from error
    written = FORMATS[format_](loaded, folder)
    say(f"{len(written)} file{'s' * (len(written) > 1)} written to {folder}")


def save(
    model: Model,
    plan: Annotated[str, typer.Option(help="Plan file.")],
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder to write.")] = None,
    push: Annotated[
        str | None, typer.Option(help="Repository on the Hub to push to: NAME or USER/NAME.")
    ] = None,
    private: Annotated[bool, typer.Option(help="A new repository is private.")] = False,
    results: Annotated[
        list[str] | None,
        typer.Option(help="JSON of compare or eval for the model card; may be repeated."),
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="Of the base model, as the Hub names it.")
    ] = None,
    dtype: Dtype = "auto",
    prefill: Prefill = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Save a model with a plan inside, as transformers loads it, or push it to the Hub."""
    from acttail.plan import SparsityPlan
    from acttail.report import Report
    from acttail.report.gather import add_results
    from acttail.share import hub
    from acttail.sparse.apply import sparsify_
    from acttail.sparse.policy import PrefillPolicy

    if (output is None) == (push is None):
        raise ActTailError("give -o FOLDER or --push REPOSITORY")
    if output is not None:
        check_output_folder(output)
    with option("--plan"):
        loaded = SparsityPlan.load(plan)
    policy = policy_of(prefill)
    found = Report("")
    for path in results or ():
        with option("--results"):
            add_results(found, path)
    lm, tokenizer = load_model(model, dtype, trust_remote_code=trust_remote_code)
    sparsify_(lm, loaded, prefill=PrefillPolicy.choose(policy))
    if output is not None:
        hub.save(lm, tokenizer, output, results=found.rows, license_=license_)
        say(f"saved to {output}; transformers loads it after `import acttail`")
    elif push is not None:
        url = hub.push(lm, tokenizer, push, private=private, results=found.rows, license_=license_)
        say(f"pushed to {url}")
