"""The command line: a thin skin over the library. One file per sub-command, heavy imports inside.

Exit status: 0 done, 1 an internal error, 2 bad input, 130 interrupted.
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer

from acttail._version import __version__
from acttail.cli import (
    analyze,
    bench,
    compare,
    convert,
    critical,
    doctor,
    evaluate,
    export,
    generate,
    lm_eval,
    plan,
    report,
    serve,
    sweep,
    tune,
)
from acttail.cli.common import fail
from acttail.errors import ActTailError

app = typer.Typer(
    name="acttail",
    help="Make large language models decode faster by activation sparsity.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="MODEL is a Hub id, a folder, a GGUF file, or smollm2-135m. "
    "Exit status: 0 done, 1 internal error, 2 bad input, 130 interrupted.",
)
# In the order of --help.
_COMMANDS: dict[str, list[tuple[str, Callable[..., None]]]] = {
    "Decide": [("analyze", analyze.analyze), ("plan", plan.plan), ("critical", critical.critical)],
    "Measure": [
        ("eval", evaluate.evaluate), ("compare", compare.compare), ("sweep", sweep.sweep), ("bench", bench.bench),
        ("report", report.report),
    ],
    "Run": [
        ("generate", generate.generate), ("serve", serve.serve), ("convert", convert.convert), ("tune", tune.tune),
    ],
    "Share": [("save", export.save), ("export", export.export)],
    "Help": [("doctor", doctor.doctor)],
}  # fmt: skip
for _panel, _commands in _COMMANDS.items():
    for _name, _function in _commands:
        app.command(_name, rich_help_panel=_panel)(_function)
app.command(
    "lm-eval",
    rich_help_panel="Measure",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(lm_eval.lm_eval)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"acttail {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["ACTTAIL_DEBUG"] = "1"


def _usage(error: Any) -> str:
    """One line for a wrong command line, with where to read more."""
    command = getattr(getattr(error, "ctx", None), "command_path", "acttail")
    return f"{error.format_message()} See: {command} --help"


def _terminate(number: int, frame: FrameType | None) -> None:
    # Unwinds the stack, so that temporary files are removed.
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command line and exit with its status."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted; nothing half-written was left behind\n")
        code = 130
    except BrokenPipeError:
        # The reader went away (`| head`): not an error, and Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except ActTailError as error:
        code = fail(str(error), 2, error)
    except MemoryError as error:
        code = fail("out of memory; use a smaller --window or --dtype bfloat16", 1, error)
    except typer.Exit as done:
        code = done.exit_code
    except Exception as error:
        # Usage errors come from click, which newer releases of typer carry inside: told by their form.
        if callable(getattr(error, "show", None)) and isinstance(
            getattr(error, "exit_code", None), int
        ):
            sys.exit(fail(_usage(error), error.exit_code, error))  # type: ignore[attr-defined]
        code = fail(
            f"internal error: {type(error).__name__}: {error} (run with --debug, and report it)",
            1,
            error,
        )
    sys.exit(code if isinstance(code, int) else 0)
