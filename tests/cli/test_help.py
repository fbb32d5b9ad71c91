"""The help of every command as a stranger reads it: at 80 columns, whole, brackets and all."""

import re

import pytest
import typer
from typer.testing import CliRunner

from acttail.cli import app
from acttail.cli.command import LiteralCommand

GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)
# lm-eval prints the help of lm-eval itself.
OWN = [name for name in COMMANDS if name != "lm-eval"]


def rendered(*arguments, width):
    done = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": str(width)})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 0, done.output
    return re.sub(r"[╭╮╰╯│─]", " ", done.output), done.output


def plain_help(name):
    """(options, help texts) as they were written, without what rich needs to see them literally."""
    command = GROUP.commands[name]
    seen = [p for p in command.params if not getattr(p, "hidden", False)]
    options = [o for p in seen for o in (*p.opts, *p.secondary_opts) if o.startswith("-")]
    helps = [p.help for p in seen if getattr(p, "help", None)]
    return options, [h.replace("\\[", "[") for h in [command.help, *helps]]


@pytest.mark.parametrize("name", OWN)
def test_no_line_is_wider_than_the_terminal_and_nothing_is_cut(name):
    text, raw = rendered(name, width=80)
    assert max(map(len, raw.splitlines())) <= 80
    assert "…" not in text
    options, helps = plain_help(name)
    shown = re.sub(r",(?=--)", " ", text).split()  # spellings of one option are joined by a comma
    assert len(options) >= 2
    for option in options:
        assert option in shown
    for word in " ".join(helps).split():
        assert word in shown, word


@pytest.mark.parametrize("name", OWN)
def test_every_help_text_is_there_literally(name):
    text, _ = rendered(name, width=400)
    for line in plain_help(name)[1]:
        for paragraph in line.split("\n\n"):
            assert " ".join(paragraph.split()) in " ".join(text.split())


def test_the_command_list():
    text, raw = rendered(width=80)
    assert max(map(len, raw.splitlines())) <= 80
    assert "…" not in text
    assert set(COMMANDS) <= set(text.split())


def test_help_is_not_markup():
    own = typer.Typer()

    def first(x: str = typer.Option("", help="see hf:NAME[/CONFIG] and [bold]this[/bold]")) -> None:
        """Take a [red]word[/red] or [/two]."""

    own.command("first", cls=LiteralCommand)(first)
    done = CliRunner().invoke(own, ["--help"], env={"COLUMNS": "120"})
    assert done.exit_code == 0
    for literal in ("hf:NAME[/CONFIG]", "[bold]this[/bold]", "[red]word[/red]", "[/two]"):
        assert literal in done.output
