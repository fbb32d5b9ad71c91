"""Every command where its output goes nowhere, its encoding lacks characters, and there is no place for a cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from byte_tokens import byte_tokenizer
from families import tempered
from forking import Runner

from acttail import cli, make_plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
TEXT = ("--text", "text.txt", "--tokens", "64", "--window", "16")
# Command -> its arguments in a folder with the model, its plan and a text.
COMMANDS = {
    "analyze": ("model", "--no-cache"),
    "plan": ("model", "--sparsity", "0.5", "-o", "made.json"),
    "critical": ("model", *TEXT),
    "eval": ("model", "--plan", "plan.json", *TEXT),
    "compare": ("model", *TEXT, "--sparsity", "0.5", "--allocator", "uniform,acttail", "-o", "compared.json"),
    "sweep": ("model", *TEXT, "--sparsity", "0.5", "--allocator", "uniform", "-o", "swept.csv"),
    "bench": ("model", "--sparsity", "0.5", "--new-tokens", "2", "--rounds", "1", "--prompt-tokens", "4", "--threads", "1"),
    "report": ("model", "--plan", "plan.json", "-o", "report.html", "--no-spectra"),
    "generate": ("model", "--prompt", "ab", "--max-new-tokens", "4", "--plan", "plan.json"),
    # Sampled, one text of some hundred ends before it begins and says nothing.
    "chat": ("model", "--max-new-tokens", "4", "--temperature", "0"),
    "convert": ("model", "-o", "packed"),
    "tune": ("model",),
    "adapt": ("model", "--plan", "plan.json", "--text", "text.txt", "--tokens", "256", "--window", "16", "--steps", "1",
              "--batch", "1", "--held-out", "64", "--train", "bias", "-o", "adapted"),
    "save": ("model", "--plan", "plan.json", "-o", "saved"),
    "export": ("plan.json", "-o", "exported"),
    "doctor": (),
    "cache": (),
    "serve": ("--help",),
    "lm-eval": ("--help",),
}  # fmt: skip
# What a command says on stdout, without --json; the others write files and remarks alone.
SILENT = {"convert", "save", "export", "report", "cache", "tune"}
# One for each way of printing: rich's tables, JSON, text as it comes, help, files alone.
WAYS = ("plan", "eval", "generate", "chat", "doctor", "serve", "convert")


def test_every_command_is_here():
    names = {name for commands in cli._COMMANDS.values() for name, _ in commands} | {"lm-eval"}
    assert set(COMMANDS) == names


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model whose text is far from ASCII, its plan and a text."""
    folder = tmp_path_factory.mktemp("place")
    model = tempered("llama", 8.0, vocab_size=260)
    model.save_pretrained(folder / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    make_plan(str(folder / "model"), 0.5, allocator="uniform").save(folder / "plan.json")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return folder


@pytest.fixture(scope="module")
def runner(place, tmp_path_factory):
    previous = Path.cwd()
    os.chdir(place)
    found = Runner(tmp_path_factory.mktemp("streams"))
    os.chdir(previous)
    yield found
    found.close()


def run(runner, tmp_path, name, **named):
    stdin = "hello\n" if name == "chat" else ""
    env = {"ACTTAIL_CACHE": str(tmp_path / "cache")} | named.pop("env", {})
    status, out, err = runner(name, *COMMANDS[name], stdin=stdin, env=env, **named)
    assert "Traceback" not in err
    assert "internal error" not in err
    assert "Exception ignored" not in err
    return status, out, err


def only_line(err):
    lines = [line for line in err.splitlines() if line.startswith("acttail: ")]
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_where_the_disk_is_full(runner, tmp_path, name):
    status, _, err = run(runner, tmp_path, name, stdout="/dev/full")
    if status == 0:
        assert name in SILENT
    else:
        assert status == 2
        assert "No space left on device" in only_line(err)


@pytest.mark.parametrize("name", WAYS)
def test_where_nobody_reads(runner, tmp_path, name):
    status, _, err = run(runner, tmp_path, name, stdout="gone")
    assert status == 0
    assert "acttail: " not in err


@pytest.mark.parametrize("name", WAYS)
def test_where_stdout_was_closed(runner, tmp_path, name):
    status, _, err = run(runner, tmp_path, name, stdout="closed")
    if status == 0:
        assert name in SILENT
    else:
        assert status == 2
        assert "Bad file descriptor" in only_line(err)


@pytest.mark.parametrize("name", WAYS)
def test_where_stderr_takes_nothing(runner, tmp_path, name):
    status, _, _ = run(runner, tmp_path, name, stderr="/dev/full")
    assert status in (0, 2)


@pytest.mark.parametrize("name", COMMANDS)
def test_where_the_encoding_lacks_characters(runner, tmp_path, name):
    status, out, err = run(runner, tmp_path, name, encoding="cp1252")
    assert status == 0, err
    assert out or name in SILENT


@pytest.mark.parametrize("name", COMMANDS)
def test_where_the_cache_cannot_be_written(runner, tmp_path, name):
    status, _, err = run(runner, tmp_path, name, env={"ACTTAIL_CACHE": "/proc/acttail"})
    if status != 0:
        assert (name, status) == ("tune", 2)
        assert "/proc/acttail" in only_line(err)


@pytest.mark.parametrize("name", ["generate", "plan", "chat", "eval", "doctor", "cache"])
@pytest.mark.parametrize("home", ["", "/proc/nobody"])
def test_without_a_home(place, tmp_path, name, home):
    """In a process of its own: other libraries look for a home when they are imported."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("ACTTAIL", "XDG", "HF_"))
    }
    (tmp_path / "tmp").mkdir()
    environment |= {"HOME": home, "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "acttail", name, *COMMANDS[name]], cwd=place, env=environment,
        input="hello\n", capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "internal error" not in done.stderr
    assert "Traceback" not in done.stderr
