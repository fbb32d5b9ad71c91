"""What a file calls itself and what a model writes reach a terminal as text, never as commands to it."""

import io
import json

import pytest
from byte_tokens import byte_tokenizer
from families import build
from rich.table import Table
from typer.testing import CliRunner

from acttail.cli import app
from acttail.cli.console import CleanConsole, fail
from acttail.engine import Engine
from acttail.engine.source import convert_model
from acttail.sparse.backends import cpu

EVIL = "x\x1b[31mred\x1b]0;title\x07\x9b2J\x07\x08[bold]\u202eback"
SEEN = "xred[bold]back"


@pytest.mark.parametrize("terminal", [False, True])
def test_whatever_is_printed_is_clean(terminal):
    file = io.StringIO()
    console = CleanConsole(
        file=file, force_terminal=terminal, highlight=False, markup=False, emoji=False, width=200
    )
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    console.print(EVIL, style="red")
    console.print(table)
    text = file.getvalue()
    # rich takes the bell away first, so that the string it ended stays, as text.
    assert text.count("xred]0;title[bold]back") == 4
    assert not set(text) & {"\x9b", "\x07", "\x08", "\u202e"}
    # A style is still the console's to give.
    assert ("\x1b[31m" in text) == terminal
    assert "\x1b]0" not in text
    assert "\x1b[2J" not in text


def test_errors_are_clean(capsys):
    assert fail(f"no model {EVIL}\n\nof that name", 2, ValueError()) == 2
    assert capsys.readouterr().err == f"acttail: no model {SEEN} of that name\n"


@pytest.mark.skipif(not cpu.status().available, reason="no native library")
def test_generated_text_is_clean(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    convert_model(tmp_path / "model", tmp_path / "packed", dtype="fp32")
    real = Engine.stream

    def stream(self, *args, **named):
        pieces = list(real(self, *args, **named))
        # A sequence that breaks between two pieces.
        for i, part in enumerate([EVIL[:3], EVIL[3:]]):
            yield pieces[i].__class__(**{**vars(pieces[i]), "text": part})

    monkeypatch.setattr(Engine, "stream", stream)
    command = [
        "generate",
        str(tmp_path / "packed"),
        "--prompt",
        "ab",
        "--max-new-tokens",
        "3",
        "-q",
    ]
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, done.stdout) == (0, f"{SEEN}\n")


@pytest.mark.skipif(not cpu.status().available, reason="no native library")
def test_a_kept_model_s_name_is_clean(tiny_folder):
    Engine.from_pretrained(tiny_folder, native=True)
    from acttail.engine import kept

    description = kept.entries()[0].folder / "engine.json"
    data = json.loads(description.read_text())
    for source in (EVIL, ["x"], {"a": EVIL}, None):
        description.write_text(json.dumps(data | {"source": source}))
        done = CliRunner().invoke(app, ["cache"])
        assert done.exit_code == 0
        assert "\x1b" not in done.output
