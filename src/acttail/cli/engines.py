"""Which engine a command runs: the option, the dtypes either of them takes, and opening one."""

import warnings
from typing import Annotated, Any

import typer

from acttail.cli.common import err, load_model, work
from acttail.errors import ActTailError, ActTailWarning

ENGINES = ("auto", "native", "transformers")
# Both ways of naming a width are taken.
_ENGINE_DTYPES = {
    "bfloat16": "bf16", "float32": "fp32", "auto": "bf16", "fp32": "fp32", "bf16": "bf16", "int8": "int8",
    "int4": "int4",
}  # fmt: skip
_TORCH_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}

EngineName = Annotated[
    str, typer.Option("--engine", help="auto (native where it reaches), native or transformers.")
]
AnyDtype = Annotated[
    str, typer.Option(help="bf16, fp32, int8 or int4; float16 with --engine transformers.")
]
Threads = Annotated[
    int | None, typer.Option(help="Threads that decode; all cores by default.", min=1)
]


def open_engine(
    model: str, plan: Any, *, engine: str, dtype: str, prefill: Any = "all", threads: int | None = None,
    trust_remote_code: bool = False,
) -> Any:  # fmt: skip
    """Open the engine that a command was asked for.

    Raises:
        ActTailError: an unknown engine or dtype, or the native engine was insisted on and does not run
            this model.
    """
    from acttail.engine import Engine, TransformersEngine

    if engine not in ENGINES:
        raise ActTailError(f"unknown engine {engine!r}: use {', '.join(ENGINES)}")
    if engine != "transformers" and dtype in _ENGINE_DTYPES and not trust_remote_code:
        with warnings.catch_warnings(record=True) as caught, work("preparing weights") as progress:
            warnings.simplefilter("always", ActTailWarning)
            found = Engine.from_pretrained(
                model, plan, dtype=_ENGINE_DTYPES[dtype], threads=threads, prefill=prefill,
                native=True if engine == "native" else None, progress=progress,
            )  # fmt: skip
        for warning in caught:
            if issubclass(warning.category, ActTailWarning):
                err.print(f"[dim]{warning.message}[/dim]")
        return found
    if engine == "native":
        raise ActTailError(
            f"the native engine has no dtype {dtype!r}: use bf16, fp32, int8 or int4"
            if dtype not in _ENGINE_DTYPES
            else "the native engine runs no remote code"
        )
    if dtype in ("int8", "int4"):
        raise ActTailError(
            f"{dtype} weights need the native engine; transformers runs bf16 or fp32"
        )
    lm, tokenizer = load_model(
        model, _TORCH_DTYPES.get(dtype, dtype), trust_remote_code=trust_remote_code
    )
    return TransformersEngine(lm, plan, tokenizer, prefill, "transformers was asked for")
