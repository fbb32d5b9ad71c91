"""The command line: a thin skin over the library. One file per sub-command, heavy imports inside.

Exit status: 0 done, 1 an internal error, 2 bad input, 130 interrupted.
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer

from acttail._version import __version__
from acttail.cli import (
    adapt,
    analyze,
    bench,
    cache,
    chat,
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
from acttail.cli.command import LiteralCommand, with_quiet, without_cache
from acttail.cli.console import abandon_streams, fail, open_streams, voice, warn
from acttail.errors import ActTailError, ActTailWarning

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
    "Decide": [("analyze", analyze.analyze), ("plan", plan.plan), ("critical", critical.critical), ("adapt", adapt.adapt)],
    "Measure": [
        ("eval", evaluate.evaluate), ("compare", compare.compare), ("sweep", sweep.sweep), ("bench", bench.bench),
        ("report", report.report),
    ],
    "Run": [
        ("generate", generate.generate), ("chat", chat.chat), ("serve", serve.serve), ("convert", convert.convert), ("tune", tune.tune),
    ],
    "Share": [("save", export.save), ("export", export.export)],
    "Help": [("doctor", doctor.doctor), ("cache", cache.cache)],
}  # fmt: skip
# Those that keep converted models, and take --no-cache.
_KEEPING = ("generate", "chat", "serve", "bench", "eval", "compare")
for _panel, _commands in _COMMANDS.items():
    for _name, _function in _commands:
        _whole = without_cache(_function) if _name in _KEEPING else _function
        app.command(_name, cls=LiteralCommand, rich_help_panel=_panel)(with_quiet(_whole))
app.command(
    "lm-eval",
    cls=LiteralCommand,
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
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", envvar="ACTTAIL_QUIET", help="No progress and no remarks on stderr."
        ),
    ] = False,
) -> None:
    voice.quiet = quiet
    if debug:
        os.environ["ACTTAIL_DEBUG"] = "1"


def _usage(error: Any) -> str:
    """One line for a wrong command line, with where to read more."""
    command = getattr(getattr(error, "ctx", None), "command_path", "acttail")
    return f"{error.format_message()} See: {command} --help"


def _terminate(number: int, frame: FrameType | None) -> None:
    # Unwinds the stack, so that temporary files are removed.
    raise SystemExit(128 + number)


def _show_warnings() -> None:
    """Warnings of acttail are one line on stderr like its errors; they may name what a file holds."""
    plain = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, ActTailWarning):
            warn(f"acttail: {' '.join(str(message).split())}")
        else:
            plain(message, category, *rest, **named)

    warnings.showwarning = show


def main() -> None:
    """Run the command line and exit with its status."""
    signal.signal(signal.SIGTERM, _terminate)
    open_streams()
    _show_warnings()
    try:
        code = _run()
    except SystemExit as stop:
        # Of a signal; or of rich or typer, for whom a reader that went away is an error.
        gone = isinstance(stop.__context__, BrokenPipeError)
        code = 0 if gone else stop.code if isinstance(stop.code, int) else 1
    # What is still in a buffer would fail at exit, with a traceback and a status of Python's own.
    if code == 0:
        code = _ended(sys.stdout.flush)
    abandon_streams()
    sys.exit(code)


def _run() -> int:
    def command() -> int:
        code = app(standalone_mode=False)
        return code if isinstance(code, int) else 0

    try:
        return _ended(command)
    except Exception as error:
        # Usage errors come from click, which newer releases of typer carry inside: told by their form.
        if callable(getattr(error, "show", None)) and isinstance(
            getattr(error, "exit_code", None), int
        ):
            return fail(_usage(error), error.exit_code, error)  # type: ignore[attr-defined]
        return fail(
            f"internal error: {type(error).__name__}: {error} (run with --debug, and report it)",
            1,
            error,
        )


def _ended(run: Callable[[], int | None]) -> int:
    """The exit status of what ends in one of the foreseen ways."""
    try:
        return run() or 0
    except (KeyboardInterrupt, typer.Abort):
        voice.last("interrupted; nothing half-written was left behind")
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`): not an error.
        return 0
    except ActTailError as error:
        return fail(str(error), 2, error)
    except MemoryError as error:
        return fail("out of memory; use a smaller --window or --dtype bfloat16", 1, error)
    except typer.Exit as done:
        return done.exit_code
    except OSError as error:
        # Of the machine, not of acttail: a full disk, a folder without rights, an output that takes nothing.
        named = f"{error.filename}: " if error.filename else ""
        return fail(
            f"{named}{error.strerror or error}; check the place, its rights and free space",
            2,
            error,
        )
