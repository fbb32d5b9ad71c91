"""What every command gets when it is registered: literal help, --quiet, and --no-cache where it keeps models."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from acttail.cli.console import voice

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress and no remarks on stderr."),
]

NoCache = Annotated[
    bool,
    typer.Option("--no-cache", help="Neither keep nor read converted weights."),
]


class LiteralCommand(TyperCommand):
    """A command whose help means what it says: `[/CONFIG]` is text, not the end of a style."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Without rich, typer prints help as it is.
        if self.rich_markup_mode is None:
            return
        self.help = escape(self.help or "")
        for parameter in self.params:
            text = getattr(parameter, "help", None)
            if text:
                parameter.help = escape(text)  # type: ignore[attr-defined]


def with_quiet(function: Callable[..., None]) -> Callable[..., None]:
    """The command with an option --quiet, which it need not know of."""

    @functools.wraps(function)
    def command(*args: Any, quiet: bool = False, **kwargs: Any) -> None:
        voice.quiet = voice.quiet or quiet
        function(*args, **kwargs)

    return _with_flag(function, command, "quiet", Quiet)


def without_cache(function: Callable[..., None]) -> Callable[..., None]:
    """The command with an option --no-cache, which it need not know of."""

    @functools.wraps(function)
    def command(*args: Any, no_cache: bool = False, **kwargs: Any) -> None:
        if no_cache:
            os.environ["ACTTAIL_CACHE_LIMIT"] = "0"
        function(*args, **kwargs)

    return _with_flag(function, command, "no_cache", NoCache)


def _with_flag(
    function: Callable[..., None], command: Callable[..., None], name: str, annotation: Any
) -> Callable[..., None]:
    signature = inspect.signature(function, eval_str=True)
    option = inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation
    )
    parameters = [*signature.parameters.values(), option]
    # typer reads the signature, older releases the annotations too.
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return command
