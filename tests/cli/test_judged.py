"""Every argument of every command is judged before a model is opened: one line that names it, exit 2, no file."""

import json
import sys

import pytest

from acttail import cli, make_plan
from acttail.model import opened

JUNK = "junk.json"  # a file that is no plan, no curves, no results
ABSENT = "absent/file"
PLAN = "plan.json"  # a plan
# Command -> what it needs besides.
NEEDED = {
    "analyze": (), "plan": ("--sparsity", "0.5"), "eval": ("--text", "python-docs:score"),
    "compare": ("--text", "python-docs:score"), "sweep": ("--text", "python-docs:score", "-o", "sweep.csv"),
    "critical": ("--text", "python-docs:score"), "generate": ("--prompt", "a"), "bench": (), "tune": (),
    "convert": ("-o", "out.acttail"), "serve": (), "chat": (), "save": ("--plan", JUNK, "-o", "out"),
    "report": ("-o", "report.html"),
    "adapt": ("--plan", PLAN, "--text", "python-docs:calibration", "-o", "out"),
}  # fmt: skip
DTYPE = ("--dtype", "int3", "int3")
TEXTS = (
    ("--text", ABSENT, ABSENT), ("--tokens", "0", "tokens"), ("--window", "1", "window"), DTYPE,
)  # fmt: skip
SCORED = (
    *TEXTS, ("--stride", "0", "stride"), ("--prefill", "some", "some"), ("--metrics", "ppl", "ppl"),
    ("--device-map", "moon", "moon"), ("--max-memory", "cpu", "--max-memory"),
)  # fmt: skip
CALIBRATED = (("--calibration-text", ABSENT, ABSENT), ("--calibration-tokens", "0", "calibration-tokens"), ("--curves", JUNK, JUNK))  # fmt: skip
RUN = (
    DTYPE, ("--plan", ABSENT, ABSENT), ("--plan", JUNK, JUNK), ("--engine", "gpu", "gpu"),
    ("--threads", "0", "--threads"), ("--prefill", "some", "some"), ("--drafts", "plan", "--lossless"),
)  # fmt: skip
# A plan that the command is to make itself.
REQUEST = (
    ("--sparsity", "1.5", "1.5"), ("--sparsity", "nan", "nan"), ("--max-loss", "-1", "-1"), ("--max-kl", "0", "0"),
    ("--allocator", "best", "best"), ("--allocator", "sensitivity", "--calibration-text"),
    ("--calibration-text", ABSENT, ABSENT), ("--curves", JUNK, JUNK),
)  # fmt: skip
SAMPLING = (
    ("--max-new-tokens", "0", "max-new-tokens"), ("--temperature", "-1", "temperature"), ("--top-k", "-1", "top-k"),
    ("--top-p", "1.5", "top-p"), ("--min-p", "1.5", "min-p"), ("--repetition-penalty", "0", "repetition"),
    ("--temperature", "nan", "temperature"),
)  # fmt: skip
# Command -> (option, bad value, what the line must say).
BAD = {
    "analyze": (("--estimator", "eye", "eye"), ("--jobs", "0", "--jobs"), ("-o", ABSENT, "absent")),
    "plan": (
        ("--sparsity", "1.5", "1.5"), ("--sparsity", "nan", "nan"), ("--max-loss", "-1", "-1"), ("--max-kl", "0", "0"),
        ("--allocator", "best", "best"), ("--rule", "best", "best"), ("--set", "epsilon", "epsilon"),
        ("--set", "colour=1", "colour"), ("--from", ABSENT, ABSENT), ("--from", JUNK, JUNK),
        *CALIBRATED, DTYPE, ("--device-map", "moon", "moon"), ("--max-memory", "cpu", "--max-memory"),
        ("-o", ABSENT, "absent"), ("--allocator", "sensitivity", "--calibration-text"),
    ),
    "eval": (
        *SCORED, ("--plan", ABSENT, ABSENT), ("--plan", JUNK, JUNK), ("--engine", "gpu", "gpu"),
        ("--tasks", "chess", "chess"), ("--limit", "0", "--limit"), ("--save-nll", ABSENT, "absent"),
        ("--stride", "4096", "stride"),
    ),
    "compare": (
        *SCORED, *CALIBRATED, ("--sparsity", "0.5,2", "2"), ("--allocator", "uniform,best", "best"),
        ("--set", "epsilon", "epsilon"), ("-o", ABSENT, "absent"), ("--report", ABSENT, "absent"),
        ("--allocator", "sensitivity", "--calibration-text"),
    ),
    "sweep": (
        *TEXTS, *CALIBRATED, ("--prefill", "some", "some"), ("--metrics", "ppl", "ppl"), ("--sparsity", "x", "x"),
        ("--allocator", "best", "best"), ("--rule", "best", "best"), ("--rule", "threshold", "--calibration-text"),
        ("--jobs", "0", "--jobs"), ("--report", ABSENT, "absent"), ("-o", ABSENT, "absent"),
    ),
    "critical": (*TEXTS, ("--keep", "0", "keep"), ("--keep", "2", "keep"), ("--rule", "best", "best")),
    "generate": (*RUN, *SAMPLING, *REQUEST),
    "bench": (
        DTYPE, ("--plan", ABSENT, ABSENT), ("--plan", JUNK, JUNK), ("--threads", "0", "--threads"), *REQUEST,
        ("--prompt-tokens", "ten", "ten"), ("--prompt-tokens", "0", "from 1 on"), ("--new-tokens", "0", "--new-tokens"),
        ("--rounds", "0", "--rounds"), ("--against", "vllm", "vllm"), ("-o", ABSENT, "absent"), ("--plot", ABSENT, "absent"),
        ("--peer-file", ABSENT, ABSENT),
    ),
    "convert": (
        DTYPE, ("--plan", ABSENT, ABSENT), ("--plan", JUNK, JUNK), ("--head-dtype", "int3", "int3"),
        ("--group", "7", "7"), ("-o", f"{JUNK}/out", JUNK),
    ),
    "tune": (DTYPE, ("--group", "7", "7")),
    "save": (("--plan", ABSENT, ABSENT), ("--plan", JUNK, JUNK), ("-o", f"{JUNK}/out", JUNK)),
    "serve": (
        *(case for case in RUN if case[0] != "--drafts"), *REQUEST, ("--port", "70000", "--port"), ("--slots", "0", "--slots"),
        ("--queue", "-1", "--queue"), ("--per-client", "0", "--per-client"), ("--wait", "-1", "wait"),
        ("--time-limit", "0", "time-limit"), ("--max-tokens", "0", "--max-tokens"), ("--max-body", "0", "--max-body"),
    ),
    "chat": (*RUN, *SAMPLING, *REQUEST, ("--load", ABSENT, ABSENT)),
    "adapt": (
        ("--plan", ABSENT, ABSENT), ("--plan", JUNK, JUNK), ("--text", ABSENT, ABSENT), ("--train", "loro", "loro"),
        ("--train", "lora,all", "lora"), ("--minutes", "0", "minutes"), ("--minutes", "nan", "minutes"),
        ("--steps", "0", "steps"), ("--tokens", "1", "tokens"), ("--window", "1", "window"), ("--batch", "0", "batch"),
        ("--rank", "0", "rank"), ("--learning-rate", "-1", "learning rate"), ("--held-out", "8", "window"), DTYPE,
        ("--device", "moon", "moon"), ("-o", f"{JUNK}/out", JUNK),
    ),
    "report": (
        ("--plan", ABSENT, ABSENT), ("--plan", JUNK, JUNK), ("--results", ABSENT, ABSENT), ("--results", JUNK, JUNK),
        ("--curves", JUNK, JUNK), ("--estimator", "eye", "eye"), ("-o", ABSENT, "absent"),
    ),
}  # fmt: skip
# What is only looked at where something is calibrated.
_CURVES = ("--allocator", "sensitivity", "--calibration-text", "python-docs:calibration")
MEASURED = {"--curves": _CURVES, "--max-loss": _CURVES, "--max-kl": _CURVES}
# Beside what an option of a request is looked at.
WITH = {
    "--allocator": ("--sparsity", "0.5"), "--calibration-text": ("--sparsity", "0.5", "--allocator", "sensitivity"),
    "--curves": ("--sparsity", "0.5"),
}  # fmt: skip
CASES = [(name, *case) for name, cases in BAD.items() for case in cases]


def names_of(option):
    """As a line may call an option."""
    return ("-o", "--output") if option == "-o" else (option,)


@pytest.fixture(scope="session")
def a_plan(tiny_folder):
    """What a plan file of the model holds."""
    return json.dumps(make_plan(str(tiny_folder), 0.5, allocator="uniform").to_dict())


@pytest.fixture
def closed(monkeypatch):
    """No model can be opened."""

    def refuse(*arguments, **more):
        raise AssertionError("the model was opened")

    monkeypatch.setattr(opened, "resolve", refuse)


@pytest.mark.parametrize(
    ("command", "option", "value", "said"), CASES, ids=[" ".join(c[:3]) for c in CASES]
)
def test_a_bad_argument_is_refused_before_a_model_is_opened(
    command, option, value, said, a_plan, closed, tiny_folder, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / JUNK).write_text(json.dumps({"junk": 1}))
    (tmp_path / PLAN).write_text(a_plan)
    before = sorted(p.name for p in tmp_path.iterdir())
    needed = NEEDED[command]
    if option in needed:
        at = needed.index(option)
        needed = (*needed[:at], *needed[at + 2 :])
    if option == "--from":
        needed = ()
    if command in ("generate", "bench", "serve", "chat"):
        needed = (*needed, *WITH.get(option, ()))
    if option in MEASURED and command in ("plan", "compare", "sweep"):
        needed = (*needed, *MEASURED[option])
        if command == "plan" and option != "--curves":
            needed = needed[2:]  # in place of a sparsity
    monkeypatch.setattr(
        sys, "argv", ["acttail", command, str(tiny_folder), *needed, f"{option}={value}" if option.startswith("--") else option]
        + ([] if option.startswith("--") else [value]),
    )  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capfd.readouterr()
    assert stop.value.code == 2, captured.err
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert said in captured.err
    # An option that is missing is named in place of the one that needs it.
    wanted = (said,) if said.startswith("--") else names_of(option)
    assert any(name in captured.err for name in wanted), captured.err
    assert "opened" not in captured.err
    assert "Traceback" not in captured.err
    if not lines[0].startswith("Usage"):  # click's own words take a box
        assert len(lines) == 1
    assert captured.out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [("--allocator", "uniform"), ("--rule", "topk"), ("--set", "epsilon=0.1"), ("--curves", "c"),
     ("--calibration-text", "self"), ("--device-map", "cpu"), ("--max-memory", "cpu=1GiB"), ("--head", None)],
)  # fmt: skip
def test_what_makes_a_budget_is_refused_beside_one(option, value, closed, monkeypatch, capfd):
    asked = [option] if value is None else [option, value]
    monkeypatch.setattr(sys, "argv", ["acttail", "plan", "some/model", "--from", JUNK, *asked])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capfd.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    assert "--from" in said
    assert f"leave out {option}" in said


@pytest.mark.parametrize("command", ["generate", "bench", "serve", "chat"])
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--sparsity", "0.4", "--max-kl", "0.1"), "give one of --sparsity, --read-share, --speedup, --max-loss and --max-kl, not --sparsity and --max-kl"),
        (("--allocator", "uniform"), "--allocator is about a plan: give one of --sparsity, --read-share, --speedup, --max-loss and --max-kl too"),
        (("--plan", JUNK, "--max-kl", "0.1"), "--plan is a whole plan: leave it out, or --max-kl"),
    ],
)  # fmt: skip
def test_what_a_plan_is_to_be_is_said_once(command, asked, said, closed, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["acttail", command, "some/model", *NEEDED[command], *asked])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (stop.value.code, capfd.readouterr().err) == (2, f"acttail: {said}\n")


def test_every_command_that_opens_a_model_is_among_them():
    from typer.main import get_command

    commands = get_command(cli.app).commands
    takes_model = {name for name, c in commands.items() if any(p.name == "model" for p in c.params)}
    assert takes_model == set(BAD)
