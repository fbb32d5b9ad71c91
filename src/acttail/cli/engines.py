"""Which engine a command runs: the option, the dtypes either of them takes, and opening one."""

import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acttail.base.dtypes import short_name
from acttail.cli.console import note
from acttail.cli.loading import load_model
from acttail.cli.progress import work
from acttail.errors import ActTailError, ActTailWarning

if TYPE_CHECKING:
    from acttail.model.opened import Opened

ENGINES = ("auto", "native", "transformers")

EngineName = Annotated[
    str, typer.Option("--engine", help="auto (native where it reaches), native or transformers.")
]
Threads = Annotated[
    int | None, typer.Option(help="Threads that decode; all cores by default.", metavar="N", min=1)
]


def check_engine(engine: str, dtype: str | None, *, trust_remote_code: bool) -> bool:
    """Judge an engine and the dtype of its weights: whether the native engine is the one to try.

    Raises:
        ActTailError: there is no such engine, or it has no such dtype or runs no remote code.
    """
    from acttail.engine.formats import FORMATS

    if engine not in ENGINES:
        raise ActTailError(f"--engine: unknown engine {engine!r}: use {', '.join(ENGINES)}")
    default = dtype in (None, "auto")
    form = None if default else FORMATS.get(short_name(str(dtype)))
    if engine != "transformers" and (default or form is not None) and not trust_remote_code:
        return True
    if engine == "native":
        raise ActTailError(
            f"--dtype: the native engine has no {dtype!r}: use {', '.join(FORMATS)}"
            if not default and form is None
            else "the native engine runs no remote code"
        )
    if form is not None and not form.runs_in_transformers:
        raise ActTailError(
            f"--dtype: {dtype} weights need the native engine; transformers runs bf16 or fp32"
        )
    return False


def open_engine(
    model: "str | Opened", plan: Any, *, engine: str, dtype: str | None, prefill: Any = None, threads: int | None = None,
    trust_remote_code: bool = False,
) -> Any:  # fmt: skip
    """Open the engine that a command was asked for.

    Args:
        model: Hub id, folder, GGUF file or alias, or what is opened.
        plan: a plan, None for the model's own or dense.
        engine: one of :data:`ENGINES`.
        dtype: in either spelling; None or ``auto`` for the widths of a GGUF file or of an .acttail folder, and
            ``bf16`` for other models.
        prefill: policy for the prompt, None for the model's own.
        threads: that decode.
        trust_remote_code: of the model's repository; transformers then runs it.

    Raises:
        ActTailError: an unknown engine or dtype, or the native engine was insisted on and does not run
            this model.
    """
    from acttail.engine import Engine

    if check_engine(engine, dtype, trust_remote_code=trust_remote_code):
        with warnings.catch_warnings(record=True) as caught, work("preparing weights") as progress:
            warnings.simplefilter("always", ActTailWarning)
            found = Engine.from_pretrained(
                model, plan, dtype=dtype, threads=threads, prefill=prefill,
                native=True if engine == "native" else None, progress=progress,
            )  # fmt: skip
        for warning in caught:
            if issubclass(warning.category, ActTailWarning):
                note(str(warning.message))
        return found
    from acttail.engine.formats import DEFAULT

    lm, tokenizer = load_model(
        model, dtype or DEFAULT.transformers, trust_remote_code=trust_remote_code
    )
    return Engine.from_model(lm, plan, tokenizer=tokenizer, prefill=prefill, native=False)
