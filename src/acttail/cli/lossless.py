"""`--lossless`: which drafters were asked for, and the engine that they make."""

from typing import Annotated, Any

import typer

from acttail.errors import ActTailError

Lossless = Annotated[
    bool,
    typer.Option(
        "--lossless", help="Say what the dense model would: the plan only drafts, it verifies."
    ),
]
Drafts = Annotated[
    str | None,
    typer.Option(help="Who drafts for --lossless: plan, ngrams or both.", metavar="WHO"),
]
# Why nothing can be asked for that would change the text.
DENSE_TEXT = "with --lossless every text is the dense model's, the plan only drafts"
# Name -> arguments of Engine.lossless.
_DRAFTERS = {
    "both": {"sparse": True, "ngrams": True},
    "plan": {"sparse": True, "ngrams": False},
    "ngrams": {"sparse": False, "ngrams": True},
}


def drafters_of(
    lossless: bool, drafts: str | None, *, engine: str = "auto", prefill: str | None = None,
    default: str = "both",
) -> dict[str, bool] | None:  # fmt: skip
    """Judge what --lossless was given with: arguments of :meth:`Engine.lossless`, None without it.

    Args:
        lossless: of --lossless.
        drafts: of --drafts.
        engine: of --engine.
        prefill: of --prefill.
        default: drafters where --drafts names none.

    Raises:
        ActTailError: something does not go with it; names the option.
    """
    if not lossless:
        if drafts is not None:
            raise ActTailError("--drafts is about --lossless: give that too")
        return None
    if (drafts or default) not in _DRAFTERS:
        raise ActTailError(f"--drafts takes {', '.join(_DRAFTERS)}, not {drafts!r}")
    if engine == "transformers":
        raise ActTailError("--lossless needs the native engine, not --engine transformers")
    if prefill is not None:
        raise ActTailError("--prefill: with --lossless every token of a prompt is dense")
    return _DRAFTERS[drafts or default]


def made_lossless(engine: Any, drafters: dict[str, bool] | None) -> Any:
    """The lossless engine that `engine` drafts for, or itself if none was asked for.

    Raises:
        ActTailError: it is not the native one, or nothing would draft.
    """
    if drafters is None:
        return engine
    if drafters["sparse"] and not drafters["ngrams"] and engine.plan is None:
        raise ActTailError(
            "--drafts plan: there is no plan to draft with; give --plan, --sparsity or --drafts ngrams"
        )
    return engine.lossless(**drafters)


def how_it_runs(engine: Any, made: Any) -> str:
    """In words: under which plan an engine decodes, or drafts."""
    plan = f"sparsity {engine.plan.sparsity:g}" if engine.plan else "dense"
    if made is engine:
        return plan
    return f"lossless, drafts {f'at {plan}' if made.draft is not None else 'by n-grams'}"
