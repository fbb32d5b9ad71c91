"""What reaches a terminal: no control characters, every block once, nothing lost that is taller than the screen."""

import io
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from acttail.base.controls import Cleaner, clean
from acttail.chat.markdown import Block, split
from acttail.chat.screen import PlainScreen

ANSWER = """# Colours

Some **bold** words and `code`,
on two lines.

- red
- green

  still green

1. one

2. two

| a | b |
|---|---|
| 1 | 2 |

<div>kept</div>

```python
def add(a, b):

    return a + b
```

The end with a [link](https://example.org).
"""


def rendered(text, width=80):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(Block(text))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\tand\nlines — ünïcode 漢字", "plain\tand\nlines — ünïcode 漢字"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[?1049h\x1b[2Jx", "x"),
        ("a\x1b]0;title\x07b", "ab"),
        ("a\x1b]8;;http://x\x1b\\b", "ab"),
        ("a\x1b]52;c;never closed\nnext", "a\nnext"),
        ("\x9b31mred\x9d0;t\x9cx", "redx"),
        ("a\rb\x08c\x07d\x7fe\x00", "abcde"),
        ("\x1b(0x\x1bcy", "xy"),
        ("a\u202eb", "ab"),
        ("end\x1b", "end"),
    ],
)
def test_control_characters(text, expected):
    assert clean(text) == expected
    cleaner = Cleaner()
    assert "".join(map(cleaner.push, text)) + cleaner.finish() == expected


@given(
    st.lists(
        st.text(st.sampled_from("ab[];0mH\x1b\x07\x9b\x9d\x9c\\\n\r\t"), max_size=6), max_size=8
    )
)
def test_no_control_character_is_left_however_the_text_is_cut(pieces):
    cleaner = Cleaner()
    text = "".join(map(cleaner.push, pieces)) + cleaner.finish()
    assert not [c for c in text if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160)]
    assert text.count("\n") == "".join(pieces).count("\n")


def test_finished_blocks_are_what_the_whole_has():
    assert split("one\n\ntw") == ([], "one\n\ntw")
    assert split("one\n\ntwo\n") == (["one"], "two\n")
    assert split("- a\n\n  b\n- c\n") == ([], "- a\n\n  b\n- c\n")
    assert split("```\na\n\nb\n") == ([], "```\na\n\nb\n")
    assert split("1. a\n\n2") == ([], "1. a\n\n2")
    rest, found = "", []
    for character in ANSWER:
        blocks, rest = split(rest + character)
        found += blocks
    whole, last = split(ANSWER)
    assert [*found, rest] == [*whole, last]
    assert len(found) == 7


def test_markdown_keeps_lines_links_and_html():
    shown = rendered(ANSWER)
    assert "Some bold words and code,\non two lines." in shown
    assert "<div>kept</div>" in shown
    assert "link (https://example.org)" in shown
    assert shown.startswith("Colours")
    assert max(map(len, shown.splitlines())) <= 80
    assert "[bold]x[/]" in rendered("[bold]x[/]")


def test_plain_text_is_as_it_came_and_ends_its_line():
    file = io.StringIO()
    with PlainScreen(file) as screen:
        for piece in ("**a** \x1b", "[31mb\n", "c"):
            screen.write(piece)
    assert file.getvalue() == "**a** b\nc\n"


DRAW = """
import sys, time
from acttail.chat.screen import MarkdownScreen
from acttail.chat.session import console_for
text = open(sys.argv[1]).read()
with MarkdownScreen(console_for()) as screen:
    for i, character in enumerate(text):
        screen.write(character)
        if i % 40 == 0:
            time.sleep(0.01)
print("DONE")
time.sleep(600)
"""


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux, a terminal to look at")
def test_an_answer_taller_than_the_screen(tmp_path):
    """Nothing twice, nothing missing: what the terminal shows in the end is every block, drawn once."""
    blocks = [
        "Begin.",
        "```\n" + "\n".join(f"line {i}" for i in range(60)) + "\n```",
        "- x\n" * 30,
        "End.",
    ]
    text = tmp_path / "answer.md"
    text.write_text("\n\n".join(b.strip("\n") for b in blocks))
    script = tmp_path / "draw.py"
    script.write_text(DRAW)
    tmux = ["tmux", "-L", f"acttail-{tmp_path.name}-{time.time_ns()}", "-f", "/dev/null"]
    command = f"PYTHONPATH={shlex.quote(':'.join(sys.path))} {sys.executable} {script} {text}"
    subprocess.run(
        [*tmux, "new-session", "-d", "-x", "80", "-y", "24", "-s", "t", command], check=True
    )
    try:
        for _ in range(600):
            capture = [*tmux, "capture-pane", "-p", "-t", "t", "-S", "-"]
            done = subprocess.run(capture, check=True, capture_output=True, text=True)
            if "DONE" in done.stdout:
                break
            time.sleep(0.1)
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    expected = ["Begin.", *(f"line {i}" for i in range(60)), *["• x"] * 30, "End.", "DONE"]
    assert lines == expected
