"""A converted folder is a MODEL for every command."""

import json

import pytest

from acttail import cli
from acttail.engine.source import convert_model
from acttail.sparse.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.status().available, reason="no native library")


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    return convert_model(
        tiny_folder, tmp_path_factory.mktemp("packed") / "tiny.acttail", dtype="int8"
    )


SCORED = ("--text", "{text}", "--window", 64, "--tokens", 256)
# Command -> what it is asked besides a model, and where that is written.
COMMANDS = {
    "analyze": ("--json", "-o", "{out}"),
    "plan": ("--sparsity", 0.5, "-o", "{out}"),
    "plan calibrated": (
        "--sparsity", 0.5, "--allocator", "sensitivity", "--calibration-text", "{text}", "--calibration-tokens", 128,
        "-o", "{out}",
    ),
    "eval": (*SCORED, "--json", "--plan", "{plan}"),
    "eval native": (*SCORED, "--json", "--engine", "native", "--plan", "{plan}"),
    "compare": (*SCORED, "--sparsity", "0.5", "-o", "{out}"),
    "sweep": (*SCORED, "--sparsity", "0.5", "--allocator", "uniform", "-o", "{out}.csv"),
    "critical": ("--text", "{text}", "--window", 64, "--tokens", 128, "--json"),
    "bench": ("--new-tokens", 4, "--prompt-tokens", 8, "--rounds", 2, "--against", "hf", "--json"),
    "generate": ("--prompt", "ab", "--max-new-tokens", 3, "--json", "--plan", "{plan}"),
    "generate transformers": ("--prompt", "ab", "--max-new-tokens", 3, "--json", "--engine", "transformers"),
    "tune": ("--json",),
    "convert": ("--plan", "{plan}", "-o", "{out}"),
    "save": ("--plan", "{plan}", "-o", "{out}"),
    "adapt": (
        "--plan", "{plan}", "--text", "{text}", "--train", "norm", "--steps", 1, "--window", 64, "--batch", 1,
        "--held-out", 128, "-o", "{out}",
    ),
    "report": ("--plan", "{plan}", "-o", "{out}"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_every_command_takes_it(case, folder, run, tmp_path, text_file):
    plan = tmp_path / "plan.json"
    assert run("plan", folder, "--sparsity", 0.5, "--allocator", "uniform", "-o", plan)[0] == 0
    named = {"text": text_file, "out": tmp_path / "out", "plan": plan}
    arguments = [str(a).format(**named) for a in COMMANDS[case]]
    code, out, err = run(case.split()[0], folder, *arguments)
    assert code == 0, err
    if "--json" in arguments:
        json.loads(out)
    if "-o" in arguments:
        assert list(tmp_path.glob("out*"))


def test_no_command_that_takes_a_model_is_left_out():
    from typer.main import get_command

    commands = get_command(cli.app).commands
    takes_model = {name for name, c in commands.items() if any(p.name == "model" for p in c.params)}
    # Those two wait for requests and for lines; both open it as `generate` does.
    assert takes_model - {"serve", "chat"} == {case.split()[0] for case in COMMANDS}


def test_what_is_not_possible_names_the_source(folder, run, tmp_path, text_file):
    done = run("convert", folder, "--dtype", "int4", "-o", tmp_path / "again")
    assert done == (2, "", "acttail: tiny.acttail holds int8 weights with a head in int8; convert tiny-llama again: leave out dtype=int4\n")  # fmt: skip
    (folder / "config.json").rename(tmp_path / "config.json")
    code, _, err = run("eval", folder, "--text", text_file)
    (tmp_path / "config.json").rename(folder / "config.json")
    assert code == 2
    assert "take tiny-llama, or convert that again" in err
