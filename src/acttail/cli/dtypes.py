"""The --dtype options: either spelling of a width, judged before a model is opened."""

from typing import Annotated

import typer

from acttail.base.dtypes import FAST, FLOATS, short_name, torch_name
from acttail.cli.judge import option
from acttail.errors import ActTailError


def _float(value: str) -> str:
    name = torch_name(value)
    if name not in ("auto", FAST, *FLOATS):
        raise ActTailError(
            f"--dtype: unknown dtype {value!r}: use auto, {FAST}, {', '.join(FLOATS)}"
        )
    return name


def _head(value: str | None) -> str | None:
    from acttail.engine.formats import weight_format

    with option("--head-dtype"):
        return None if value is None else weight_format(value).name


def _weights_or_auto(value: str) -> str:
    from acttail.engine.formats import AUTO, weight_format

    with option("--dtype"):
        return value if value == AUTO else weight_format(value).name


def _either(value: str | None) -> str | None:
    from acttail.engine.formats import FORMATS

    if value is None:
        return None
    known = (*FORMATS, short_name("float16"), "auto")
    if short_name(value) not in known:
        raise ActTailError(f"--dtype: unknown dtype {value!r}: use {', '.join(known)}")
    return short_name(value)


Dtype = Annotated[
    str,
    typer.Option(
        help="fast (bfloat16 where the device multiplies it, else float32), bfloat16, float32, float16, or auto.",
        callback=_float,
    ),
]
EngineDtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Weights of the engine: auto (each matrix as wide as a GGUF has it, else bf16), fp32, bf16, int8 or int4.",
        callback=_weights_or_auto,
    ),
]
HeadDtype = Annotated[
    str | None,
    typer.Option(
        help="Embedding and output head; by default int8, and fp32 for fp32.", callback=_head
    ),
]
AnyDtype = Annotated[
    str | None,
    typer.Option(
        help="auto (the default: each matrix as wide as a GGUF has it, else bf16), fp32, bf16, int8, int4; fp16 "
        "through transformers alone.",
        callback=_either,
    ),
]
