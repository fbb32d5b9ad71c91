"""Options that several commands share, each worded once."""

from typing import Annotated

import typer

from acttail.errors import ActTailError

Model = Annotated[
    str,
    typer.Argument(
        help="Hub id, folder (converted ones too), GGUF file, or smollm2-135m.", metavar="MODEL"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Window = Annotated[int, typer.Option(help="Tokens per window.")]
Tokens = Annotated[int | None, typer.Option(help="Use only the first N tokens of the text.", min=2)]
Stride = Annotated[
    int | None, typer.Option(help="Tokens between window starts (no overlap by default).")
]
Prefill = Annotated[
    str | None, typer.Option(help="all, first_dense=N, last_fraction=F, or decode_only.")
]
ResultFile = Annotated[str | None, typer.Option("-o", "--output", help="Also write the JSON here.")]
TEXT_HELP = "File, folder, python-docs:score, or hf:ID[/CONFIG][:SPLIT]."
TextName = Annotated[str, typer.Option("--text", help=TEXT_HELP)]
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
Curves = Annotated[
    str | None,
    typer.Option(help="File of sensitivity curves: read if it is there, else written."),
]
ReportPage = Annotated[str | None, typer.Option(help="Also write a self-contained HTML page.")]
Sparsities = Annotated[str, typer.Option(help="Comma-separated model sparsities.")]
Allocators = Annotated[str, typer.Option(help="Comma-separated allocators.")]
PlanFile = Annotated[str | None, typer.Option(help="Plan file; dense without one.")]


def _group(value: int | None) -> int | None:
    # What the kernels read: 32 levels lie together.
    if value is not None and (value < 0 or value % 32):
        raise ActTailError(f"--group: a scale group holds a multiple of 32 inputs, not {value}")
    return value


# Two flags: as one with two names they would leave the help of `plan` too narrow.
Head = Annotated[
    bool,
    typer.Option("--head", help="Put the output head into the budget: sensitivity and refined do."),
]
NoHead = Annotated[bool, typer.Option("--no-head", help="Leave it dense.")]
Group = Annotated[
    int | None,
    typer.Option(
        help="Inputs that share a scale in int8 and int4; 0 for one each.", callback=_group
    ),
]
