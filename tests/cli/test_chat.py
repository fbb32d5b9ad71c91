"""`acttail chat` on a terminal of 80 columns, and on a pipe."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pexpect
import pytest
from byte_tokens import byte_tokenizer
from talker import talker

from acttail.calibrate.curves import SensitivityCurves

CHAINS = {
    "!": [
        "Hel",
        "lo ",
        "**wor",
        "ld**",
        "\x1b[35m",
        " and ",
        "\x1b]0;owned\x07",
        "good",
        "\x9b2J",
        " day",
    ],
    "?": ["on", "wards ", None],
    ".": [],
}
WHERE = "\x1b[6n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("talker") / "model", byte_tokenizer(), CHAINS)


def environment(tmp_path):
    return {**os.environ, "ACTTAIL_CACHE": str(tmp_path / "cache"), "TERM": "xterm-256color",
            "COLUMNS": "80", "LINES": "24"}  # fmt: skip


class Terminal:
    """A chat in a terminal of 80 columns; what it shows is read without colours and movements."""

    def __init__(self, folder, tmp_path, *options):
        arguments = [
            "-m",
            "acttail",
            "chat",
            str(folder),
            "--dtype",
            "fp32",
            "--threads",
            "1",
            *options,
        ]
        self.child = pexpect.spawn(
            sys.executable, arguments, dimensions=(24, 80), env=environment(tmp_path), cwd=tmp_path,
            encoding="utf-8", codec_errors="replace", timeout=60,
        )  # fmt: skip
        self.seen = ""
        self.child.logfile_read = self

    def write(self, text):
        before = self.seen.count(WHERE)
        self.seen += text
        # A terminal says where its cursor is when it is asked.
        for _ in range(self.seen.count(WHERE) - before):
            self.child.send("\x1b[1;1R")

    def flush(self):
        pass

    def expect(self, text):
        # Colours and movements may stand between any two words.
        between = r"(?:\x1b\[[0-9;?]*[A-Za-z]|\s)+"
        self.child.expect(between.join(map(re.escape, text.split())))

    def say(self, keys, text):
        self.child.send(keys)
        self.expect(text)


def test_a_chat(folder, tmp_path):
    t = Terminal(folder, tmp_path, "--max-new-tokens", "15000")
    t.expect("/help lists the commands")
    t.expect("model · fp32 · dense")
    t.say("hi!\r", "Hello")
    t.expect("world")
    t.expect("good day")
    assert "\x1b[35m" not in t.seen
    assert "owned" not in t.seen
    assert "\x9b" not in t.seen
    # Several lines: a backslash, Alt-Enter, and what is pasted.
    t.say("one\\\rtwo\x1b\rthree!\r", "good day")
    t.say("\x1b[200~four\nfive!\x1b[201~\r", "good day")
    t.say("/sparsity 0.5\r", "a plan of uniform")
    t.expect("sparsity 0.5")
    t.say("six!\r", "good day")
    t.say("/stats\r", "weights' bytes read")
    t.say("/nonsense\r", "no command /nonsense; /help lists")
    t.say("/save talk.json\r", "8 messages written")
    said = json.loads((tmp_path / "talk.json").read_text())["messages"]
    users = [m["content"] for m in said if m["role"] == "user"]
    assert users == ["hi!", "one\ntwo\nthree!", "four\nfive!", "six!"]
    assert said[1]["content"] == "".join(CHAINS["!"])
    # An answer without an end is stopped, and stays as far as it came.
    t.say("more?\r", "onwards onwards")
    t.child.sendintr()
    t.expect("stopped")
    assert "^C" not in t.seen
    t.say("/save talk.json\r", "10 messages written")
    said = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert said[-1]["content"].startswith("onwards onwards")
    assert len(said[-1]["content"]) < 15_000 * 4
    t.say("well.\r", "the model said nothing")
    t.say("/system Be kind\r", "system message: Be kind")
    t.say("/clear\r", "the system message stays")
    t.say("/save talk.json\r", "1 messages written")
    t.say("half a word\x03", "> ")
    t.say("\x03", "Ctrl-D leaves")
    t.child.send("\x04")
    t.child.expect(pexpect.EOF)
    t.child.close()
    assert t.child.exitstatus == 0
    assert (tmp_path / "cache" / "chat_history").stat().st_mode & 0o077 == 0
    assert [x for x in t.seen.splitlines() if "\x1b" not in x and len(x) > 80] == []


def test_history_and_a_conversation_that_goes_on(folder, tmp_path):
    (tmp_path / "talk.json").write_text(
        json.dumps([{"role": "user", "content": "hi!"}, {"role": "assistant", "content": "Hello"}])
    )
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "chat_history").write_text("\n# 2024-01-01 00:00:00\n+from before!\n")
    t = Terminal(folder, tmp_path, "--load", "talk.json", "--system", "Be kind")
    t.expect("model · fp32 · dense")
    t.say("\x1b[A\r", "good day")
    t.say("/save again.json\r", "5 messages written")
    said = json.loads((tmp_path / "again.json").read_text())["messages"]
    assert [m["content"] for m in said[:4]] == ["Be kind", "hi!", "Hello", "from before!"]
    t.say("/quit\r", "/quit")
    t.child.expect(pexpect.EOF)
    t.child.close()
    assert t.child.exitstatus == 0


def chat(folder, tmp_path, *options, piped=""):
    command = [sys.executable, "-m", "acttail", "chat", str(folder), *options]
    return subprocess.run(
        command, input=piped, capture_output=True, text=True, env=environment(tmp_path), cwd=tmp_path,
        check=False,
    )  # fmt: skip


def test_piped_input_is_answered(folder, tmp_path):
    done = chat(folder, tmp_path, "--dtype", "fp32", piped="/stats\nor not!\n")
    assert done.returncode == 0
    assert done.stdout == "Hello **world** and good day\n"
    assert "stats" not in done.stderr


@pytest.mark.parametrize(
    ("options", "piped", "says"),
    [
        ((), " \n", "nothing was piped in"),
        (("--sparsity", "2"), "a!", "from 0.0 to 0.99"),
        (("--load", "missing.json"), "a!", "cannot read missing.json"),
        (("--plan", "missing.json"), "a!", "missing.json"),
        (("--curves", "missing"), "a!", "missing"),
        (("--top-p", "0"), "a!", "--top-p is out of range"),
        (("--engine", "steam"), "a!", "unknown engine"),
        (("--dtype", "int3"), "a!", "unknown dtype"),
        (
            ("--curves", "elsewhere"),
            "a!",
            "--curves is of no use: the curves given are for another model",
        ),
    ],
)
def test_bad_options(folder, tmp_path, options, piped, says):
    grid = np.array([0.0, 0.5, 0.99])
    SensitivityCurves(grid, {"elsewhere": grid**2}, {}).save(tmp_path / "elsewhere")
    done = chat(folder, tmp_path, *options, piped=piped)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("acttail: ")]
    assert says in line


def test_it_begins_at_a_sparsity_without_a_plan_file(folder, tmp_path):
    for engine in ("native", "transformers"):
        done = chat(
            folder,
            tmp_path,
            "--dtype",
            "fp32",
            "--engine",
            engine,
            "--sparsity",
            "0.1",
            "--quiet",
            piped="a!",
        )
        assert done.returncode == 0, done.stderr  # which may tell of a slow start
        assert done.stdout
    (kept,) = (tmp_path / "cache" / "plans").iterdir()
    assert json.loads(kept.read_text())["allocator"] == "acttail"


def test_a_model_without_a_template(tiny_folder, tmp_path):
    done = chat(tiny_folder, tmp_path, piped="a!")
    assert done.returncode == 2
    assert "tiny-llama has no chat template" in done.stderr


def test_nothing_of_it_is_imported_for_help():
    code = (
        "import sys; from acttail import cli; sys.argv = ['acttail', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "assert not {'prompt_toolkit', 'torch'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
