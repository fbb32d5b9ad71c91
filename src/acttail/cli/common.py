"""What the sub-commands share: options, output on stdout, progress and errors on stderr."""

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from acttail.errors import ActTailError
from acttail.files import finite

# A bar for shorter work would only flicker.
_SHOW_AFTER_SECONDS = 2.0

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Model = Annotated[
    str, typer.Argument(help="Hub id, folder, GGUF file, or smollm2-135m.", metavar="MODEL")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float32, float16, or auto.")]
Window = Annotated[int, typer.Option(help="Tokens per window.")]
Tokens = Annotated[int | None, typer.Option(help="Use only the first N tokens of the text.", min=2)]
Stride = Annotated[
    int | None, typer.Option(help="Tokens between window starts (no overlap by default).")
]
Prefill = Annotated[
    str | None, typer.Option(help="all, first_dense=N, last_fraction=F, or decode_only.")
]
ResultFile = Annotated[str | None, typer.Option("-o", "--output", help="Also write the JSON here.")]
TextName = Annotated[
    str,
    typer.Option("--text", help="File, folder, python-docs:score, or hf:DATASET[/CONFIG][:SPLIT]."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set an allocator's argument."),
]
Metrics = Annotated[str, typer.Option(help="Comma-separated: perplexity, kl, top1.")]
CalibrationText = Annotated[
    str | None,
    typer.Option(help="Text a calibrated allocator may see; 'self' samples it from the model."),
]
CalibrationTokens = Annotated[int, typer.Option(help="Tokens of it to use.", min=2)]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Spread the model by accelerate: auto, balanced, sequential, cpu."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="What devices may take, such as cpu=8GiB,0=20GiB; the rest goes to disk."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code shipped in the model's repository.")
]


def fail(message: str, code: int, error: BaseException) -> int:
    """Print one line on stderr (and the traceback under --debug); return the exit status."""
    if os.environ.get("ACTTAIL_DEBUG") == "1":
        traceback.print_exception(error)
    line = " ".join(message.split())
    sys.stderr.write(f"acttail: {line}\n")
    return code


def print_json(value: Any) -> None:
    """Print JSON on stdout. A number that is not finite becomes null: JSON has no NaN."""
    sys.stdout.write(json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


class Work:
    """A progress bar on stderr that shows itself once the work has taken two seconds."""

    def __init__(self, description: str, console: Console) -> None:
        self._started = time.monotonic()
        self._progress: Progress | None = None
        self._task: Any = None
        self.description = description
        self._console = console

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` steps are finished."""
        if self._progress is None:
            if time.monotonic() - self._started < _SHOW_AFTER_SECONDS or done >= total:
                return
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(), console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._progress.add_task(self.description, total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total, description=self.description)

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()


@contextmanager
def work(description: str) -> Iterator[Work]:
    """A progress callback for the length of a block."""
    bar = Work(description, err)
    try:
        yield bar
    finally:
        bar.close()


def load_model(
    name: str, dtype: str, *, trust_remote_code: bool = False, device_map: str | None = None,
    max_memory: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Load a model, saying so on stderr if it takes a while.

    Raises:
        ModelError: see :func:`acttail.load`.
        ActTailError: `max_memory` is not DEVICE=SIZE pairs.
    """
    from acttail.models import load

    limits: dict[str | int, str] | None = None
    if max_memory is not None:
        limits = {}
        for pair in names(max_memory):
            device, equals, size = pair.partition("=")
            if not equals or not size:
                raise ActTailError(
                    f"--max-memory takes DEVICE=SIZE, such as cpu=8GiB; got {pair!r}"
                )
            limits[int(device) if device.isdigit() else device] = size
    with err.status(f"loading {name} …"):
        return load(
            name, dtype=dtype, trust_remote_code=trust_remote_code, device_map=device_map,
            max_memory=limits,
        )  # fmt: skip


def read_calibration_text(name: str | None, *, needed: bool) -> Any:
    """The calibration text: a Text, or None for 'self' (and where none is needed).

    Raises:
        TextError: it is needed and not given, not found, or empty.
    """
    from acttail.errors import TextError
    from acttail.text import read_text

    if name is None and needed:
        raise TextError("this allocator is calibrated: give --calibration-text FILE (or 'self')")
    return None if name in (None, "self") else read_text(str(name))


def calibration_for(model: Any, tokenizer: Any, text: Any, tokens: int, progress: Work) -> Any:
    """A Calibration; without a text, one sampled from the model itself."""
    from acttail.calibrate import Calibration
    from acttail.selftext import sample_text

    if text is None:
        text = sample_text(model, tokenizer, tokens=tokens, progress=progress)
    return Calibration(model, tokenizer, text, tokens=tokens, progress=progress)


def settings(pairs: list[str] | None) -> dict[str, str]:
    """Parse KEY=VALUE pairs.

    Raises:
        ActTailError: a pair without '='.
    """
    parsed = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ActTailError(f"--set takes KEY=VALUE, got {pair!r}")
        parsed[key.strip()] = value.strip()
    return parsed


def names(text: str) -> list[str]:
    """Parse comma-separated names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def number_list(text: str, what: str) -> list[float]:
    """Parse comma-separated numbers.

    Raises:
        ActTailError: something is not a number, or there is none.
    """
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ActTailError(f"{what} takes numbers separated by commas, got {text!r}") from error
    if not values:
        raise ActTailError(f"{what} is empty")
    return values


def with_error(value: float, error: float | None) -> str:
    """`23.11 ± 0.42`, or the value alone."""
    if not math.isfinite(value):
        return "not finite"
    digits = 2 if value < 1000 else 0
    return f"{value:,.{digits}f}" + (f" ± {error:,.{digits}f}" if error is not None else "")
