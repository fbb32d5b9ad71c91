"""Long commands say how far they are on stderr, nothing with --quiet, and nothing of it on stdout."""

import json
import re
import sys
from functools import partial

import pytest

from acttail import cli
from acttail.base.progress import ProgressLines
from acttail.cli import progress

CALIBRATED = ("--calibration-text", "python-docs:calibration", "--calibration-tokens", "64")
SCORED = ("--text", "python-docs:score", "--tokens", "64", "--window", "32")
# Command -> its arguments, and what its lines say is being done.
LONG = {
    "analyze": ((), "spectra"),
    "plan": (("--sparsity", "0.5", "--allocator", "sensitivity", *CALIBRATED, "-o", "p.json"), "loading tiny-llama"),
    "eval": (SCORED, "evaluating"),
    "compare": ((*SCORED, "--sparsity", "0.5", "--allocator", "uniform,acttail"), "comparing"),
    "sweep": ((*SCORED, "--sparsity", "0.5", "--allocator", "uniform", "-o", "s.csv"), "sweep"),
    "critical": (SCORED, "bisecting"),
    "bench": (("--sparsity", "0.5", "--prompt-tokens", "4", "--new-tokens", "4", "--rounds", "1"), "measuring"),
    "tune": ((), "timing kernels"),
    "convert": (("-o", "out.acttail"), "converting"),
    "generate": (("--prompt", "a", "--max-new-tokens", "2"), "preparing weights"),
}  # fmt: skip
JSON = {"analyze", "plan", "eval", "compare", "critical", "bench", "generate"}
# A minute or two even on the tiny model.
SLOW = {"critical"}
CASES = [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in LONG]


@pytest.fixture
def every_line(monkeypatch):
    """Lines from the first step on instead of after two seconds."""
    monkeypatch.setattr(progress, "ProgressLines", partial(ProgressLines, first=0.0, every=0.0))


def run(command, arguments, folder, monkeypatch, capfd, *more):
    monkeypatch.setattr(sys, "argv", ["acttail", command, str(folder), *arguments, *more])
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            pytest.fail(capfd.readouterr().err)
    return capfd.readouterr()


@pytest.mark.parametrize("command", CASES)
def test_steps_are_counted_on_stderr(
    command, every_line, tiny_folder, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    arguments, done = LONG[command]
    as_json = ("--json",) if command in JSON else ()
    said = run(command, arguments, tiny_folder, monkeypatch, capfd, *as_json)
    assert re.search(rf"^{done}.*: \d+/\d+ \(\d+ %\), \d+ s", said.err, re.MULTILINE), said.err
    assert "it/s" not in said.err  # no bar of another library either
    assert "\r" not in said.err
    if as_json:
        json.loads(said.out)


@pytest.mark.parametrize("command", CASES)
def test_quiet_is_silent(command, every_line, tiny_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert run(command, LONG[command][0], tiny_folder, monkeypatch, capfd, "--quiet").err == ""
