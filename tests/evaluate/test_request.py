"""A plan on request: made once, kept with the model, and made again as soon as anything it depends on changes."""

import json

import pytest
import torch
from test_kept import write_model

from acttail.allocate import make_plan
from acttail.calibrate.text import Text
from acttail.engine import kept, kept_plans
from acttail.errors import ActTailError, BudgetError
from acttail.evaluate import request as room
from acttail.evaluate.request import PlanRequest, requested
from acttail.model.opened import open_model

TEXT = Text("words", "The quick brown fox jumps over the lazy dog and runs. " * 200)


@pytest.fixture
def closed(monkeypatch):
    """From here on no plan can be made."""

    def close():
        def refuse(*_, **__):
            raise AssertionError("the plan was made again")

        monkeypatch.setattr(room, "make", refuse)

    return close


@pytest.fixture(params=["folder", "gguf", "acttail"])
def model(request, tiny_folder, tmp_path, tokenizer):
    if request.param == "folder":
        return tiny_folder
    file = write_model(tmp_path / "tiny.gguf", tokenizer)
    if request.param == "gguf":
        return file
    from acttail.engine.source import convert_model

    return convert_model(file, tmp_path / "tiny.acttail")


def test_a_plan_is_made_once(model, closed):
    first = requested(open_model(model), PlanRequest(0.4))
    assert first.plan == make_plan(str(model), 0.4)
    closed()
    again = requested(open_model(model), PlanRequest(0.4))
    assert (again.kept, again.plan) == (True, first.plan)
    # Said in another way, the same is asked.
    assert requested(open_model(model), PlanRequest(0.4, allocator="acttail")).kept


@pytest.mark.parametrize(
    "other",
    [
        {"sparsity": 0.41},
        {"allocator": "uniform"},
        {"arguments": {"epsilon": "0.1"}},
        {"rule": "wina"},
        {"head": True},
    ],
    ids=str,
)
def test_another_request_is_another_plan(tiny_folder, closed, other):
    opened = open_model(tiny_folder)
    requested(opened, PlanRequest(0.4))
    closed()
    with pytest.raises(AssertionError, match="made again"):
        requested(opened, PlanRequest(**{"sparsity": 0.4} | other))


def test_another_model_under_the_same_name_is_another_plan(tmp_path, tokenizer, closed):
    file = write_model(tmp_path / "tiny.gguf", tokenizer)
    requested(open_model(file), PlanRequest(0.4, allocator="uniform"))
    write_model(file, tokenizer, seed=1)
    closed()
    with pytest.raises(AssertionError, match="made again"):
        requested(open_model(file), PlanRequest(0.4, allocator="uniform"))


def test_nothing_is_kept_under_a_limit_of_nothing(tiny_folder, monkeypatch):
    monkeypatch.setenv(kept.LIMIT, "0")
    for _ in range(2):
        assert not requested(open_model(tiny_folder), PlanRequest(0.4, allocator="uniform")).kept
    assert kept_plans.count() == 0


def test_a_damaged_plan_is_made_again(tiny_folder):
    opened, asked = open_model(tiny_folder), PlanRequest(0.4, allocator="uniform")
    first = requested(opened, asked)
    place = kept_plans.place_of(opened, asked.key)
    place.write_text(place.read_text()[:-40])
    again = requested(opened, asked)
    assert (again.kept, again.plan) == (False, first.plan)
    assert requested(opened, asked).kept


def test_a_fresh_one_is_made_and_kept(tiny_folder):
    opened, asked = open_model(tiny_folder), PlanRequest(0.4, allocator="uniform")
    assert not requested(opened, asked).kept
    assert not requested(opened, asked, fresh=True).kept
    assert requested(opened, asked).kept


def test_a_limit_is_searched_once(tiny_folder, closed):
    opened = open_model(tiny_folder)
    asked = PlanRequest(max_kl=0.05, text=TEXT, tokens=512, dtype="float32")
    assert (asked.name, asked.limit) == ("sensitivity", ("kl", 0.05))
    first = requested(opened, asked)
    assert 0 < first.quality.measured <= 0.05
    closed()
    assert requested(opened, asked).plan == first.plan
    for other in ({"max_kl": 0.06}, {"tokens": 513}, {"text": Text("words", TEXT.content + "!")}):
        with pytest.raises(AssertionError, match="made again"):
            requested(
                opened,
                PlanRequest(
                    **{"max_kl": 0.05, "text": TEXT, "tokens": 512, "dtype": "float32"} | other
                ),
            )


def test_curves_are_written_first_and_read_then(tiny_folder, tmp_path, closed):
    opened, path = open_model(tiny_folder), tmp_path / "curves.safetensors"
    asked = PlanRequest(
        0.4, allocator="sensitivity", arguments={"curves": str(path)}, text=TEXT, tokens=128
    )
    assert asked.writes_curves
    assert asked.calibrated
    first = requested(opened, asked)
    assert path.exists()
    assert not asked.calibrated
    closed()
    assert requested(opened, asked).plan == first.plan
    path.unlink()  # asked for again, so it is not enough to know the plan
    with pytest.raises(AssertionError, match="made again"):
        requested(opened, asked)


def test_a_model_that_carries_a_plan_is_measured_dense(tiny_folder, tmp_path):
    from acttail.engine.source import convert_model

    plan = make_plan(str(tiny_folder), 0.9, allocator="uniform")
    folders = [
        convert_model(tiny_folder, tmp_path / n, dtype="fp32", plan=p)
        for n, p in (("a", None), ("b", plan))
    ]
    asked = PlanRequest(0.5, allocator="sensitivity", text=TEXT, tokens=128, dtype="float32")
    dense, sparse = (room.make(open_model(f), asked).plan for f in folders)
    assert {n: e.k for n, e in dense.projections.items()} == {
        n: e.k for n, e in sparse.projections.items()
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "one of sparsity, read_share, speedup, max_loss and max_kl"), ({"sparsity": 0.4, "max_kl": 1}, "one of sparsity"),
        ({"sparsity": 1}, "from 0.0 to 0.99"), ({"max_loss": 0}, "positive"), ({"sparsity": 0.4, "allocator": "best"}, "best"),
        ({"sparsity": 0.4, "rule": "best"}, "best"), ({"sparsity": 0.4, "arguments": {"colour": "1"}}, "colour"),
        ({"sparsity": 0.4, "allocator": "greedy", "head": True}, "greedy leaves the output head dense"),
    ],
)  # fmt: skip
def test_what_makes_no_plan_is_refused_at_once(arguments, says):
    with pytest.raises((ActTailError, BudgetError), match=says):
        PlanRequest(**arguments)


def test_few_are_kept(tiny_folder, monkeypatch):
    monkeypatch.setattr(kept_plans, "_MOST", 2)
    opened = open_model(tiny_folder)
    for s in (0.1, 0.2, 0.3):
        requested(opened, PlanRequest(s, allocator="uniform"))
    assert kept_plans.count() == 2


def test_plans_go_with_their_model(tiny_folder, tmp_path, tokenizer):
    file = write_model(tmp_path / "tiny.gguf", tokenizer)
    for m in (tiny_folder, file):
        requested(open_model(m), PlanRequest(0.4, allocator="uniform"))
    assert kept_plans.clear({"tiny.gguf"}) == 1
    assert requested(open_model(tiny_folder), PlanRequest(0.4, allocator="uniform")).kept
    assert kept_plans.clear() == 1


def run(monkeypatch, capfd, *arguments):
    from acttail import cli

    monkeypatch.setattr("sys.argv", ["acttail", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    found = capfd.readouterr()
    return done.value.code, found.out, found.err


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_generate_needs_no_plan_file(tmp_path, tokenizer, monkeypatch, capfd, closed, engine):
    file = write_model(tmp_path / "tiny.gguf", tokenizer)
    command = (
        "generate",
        file,
        "--prompt",
        "ab",
        "--max-new-tokens",
        3,
        "--json",
        "--engine",
        engine,
    )
    code, out, err = run(monkeypatch, capfd, *command, "--sparsity", 0.4)
    assert code == 0, err
    first = json.loads(out)
    assert (first["sparsity"], first["allocator"]) == (0.4, "acttail")
    closed()
    again = json.loads(run(monkeypatch, capfd, *command, "--sparsity", 0.4)[1])
    assert again["text"] == first["text"]
    with pytest.raises(AssertionError, match="made again"):
        room.make()
    assert run(monkeypatch, capfd, *command, "--sparsity", 0)[0] == 1  # uniform, and not made yet


def test_bench_takes_an_allocator(tmp_path, tokenizer, monkeypatch, capfd):
    file = write_model(tmp_path / "tiny.gguf", tokenizer)
    command = (
        "bench",
        file,
        "--new-tokens",
        3,
        "--prompt-tokens",
        4,
        "--rounds",
        1,
        "--json",
        "--sparsity",
        0.4,
    )
    assert json.loads(run(monkeypatch, capfd, *command)[1])["allocator"] == "uniform"
    assert (
        json.loads(run(monkeypatch, capfd, *command, "--allocator", "acttail")[1])["allocator"]
        == "acttail"
    )


def test_a_limit_of_the_command_line(tiny_folder, monkeypatch, capfd, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.content)
    command = (
        "generate",
        tiny_folder,
        "--prompt",
        "ab",
        "--max-new-tokens",
        2,
        "--json",
        "--max-loss",
        0.2,
    )
    code, _, err = run(monkeypatch, capfd, *command)
    assert (code, err.count("\n")) == (2, 1)
    assert "give --calibration-text FILE (or 'self')" in err
    torch.manual_seed(0)
    code, out, err = run(monkeypatch, capfd, *command, "--calibration-text", tmp_path / "text.txt")
    assert code == 0, err
    assert "on held-out calibration text the loss rises by" in err
    found = json.loads(out)["sparsity"]
    assert found > 0
    code, out, err = run(monkeypatch, capfd, *command, "--calibration-text", tmp_path / "text.txt")
    assert f"sparsity {found:.3f}, found by an earlier start" in err
    assert json.loads(out)["sparsity"] == found
