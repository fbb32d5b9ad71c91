"""Quality instead of sparsity; the refined rule; calibrated plans from the command line."""

import json

import numpy as np
import pytest
import torch
from byte_tokens import byte_tokenizer
from test_sensitivity import TEXT, calibration, tiny

from acttail import make_plan, perplexity, sparsify_
from acttail.allocate import AllocationContext
from acttail.base.files import cache_dir
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.curves import SensitivityCurves
from acttail.calibrate.text import Text
from acttail.errors import BudgetError, PlanError, TextError
from acttail.evaluate.quality import held_out, plan_for_quality
from acttail.model.weights import LoadedWeights

LONG = Text("long", TEXT.content * 4)


def context_of(model, **kwargs):
    c = Calibration(model, byte_tokenizer(), LONG, tokens=96, window=32, **kwargs)
    return AllocationContext(LoadedWeights(model), calibration=c)


@pytest.mark.parametrize("metric", ["loss", "kl"])
def test_the_limit_holds_on_held_out_text(metric):
    model = tiny()
    context = context_of(model)
    found = plan_for_quality(context, 0.3, metric=metric)
    assert found.measured <= 0.3
    assert 0 < found.plan.sparsity < 0.99
    text = held_out(context.calibration)
    dense = perplexity(model, byte_tokenizer(), text, window=32, tokens=4096 // 32 * 32)
    sparsify_(model, found.plan)
    again = perplexity(model, byte_tokenizer(), text, window=32, metrics=("perplexity", "kl"))
    measured = again.kl if metric == "kl" else again.nll - dense.nll
    assert measured == pytest.approx(found.measured, rel=1e-4, abs=1e-6)
    # A looser limit is never sparser.
    tighter = plan_for_quality(context_of(tiny()), 0.1, metric=metric)
    assert tighter.plan.sparsity <= found.plan.sparsity


def test_bad_limits():
    for bad in (0, -1, float("nan")):
        with pytest.raises(BudgetError, match="positive number"):
            plan_for_quality(context_of(tiny()), bad)
    short = AllocationContext(LoadedWeights(model := tiny()), calibration=calibration(model, 380))
    with pytest.raises(TextError, match="to verify on"):
        plan_for_quality(short, 0.1)


def test_refined_thresholds_realise_the_budget_on_the_calibration_text():
    model = tiny()
    context = context_of(model)
    plan = make_plan(model, 0.5, allocator="refined", rule="threshold", context=context)
    sparsify_(model, plan)
    result = perplexity(model, byte_tokenizer(), LONG, window=32, tokens=96)
    assert result.realised.model == pytest.approx(0.5, abs=0.03)
    # And tokens differ in how much they keep: that is the point.
    kept = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda m, a: kept.append((m.acttail_rule(a[0]) != 0).sum(-1).flatten())
    )
    with torch.no_grad():
        model(torch.randint(3, 260, (1, 32)))
    assert len(set(kept[0].tolist())) > 1


def test_command_line(run, tiny_folder, tmp_path):
    text = tmp_path / "calibration.txt"
    text.write_text(LONG.content)
    curves, plan = tmp_path / "c.safetensors", tmp_path / "p.json"
    base = ("plan", tiny_folder, "--allocator", "sensitivity", "--curves", curves, "-o", plan)
    code, _, _ = run(
        *base, "--sparsity", 0.5, "--calibration-text", text, "--calibration-tokens", 96
    )
    assert code == 0
    assert curves.exists()
    first = json.loads(plan.read_text())
    code, _, err = run(*base, "--sparsity", 0.6)  # the curves are enough
    assert (code, err) == (0, "")
    assert json.loads(plan.read_text())["sparsity"] == 0.6
    assert first["allocator"] == "sensitivity"
    code, _, err = run("plan", tiny_folder, "--sparsity", 0.5, "--allocator", "greedy")
    assert code == 2
    assert "--calibration-text" in err
    code, _, err = run("plan", tiny_folder, "--sparsity", 0.5, "--rule", "best")
    assert code == 2
    assert "best" in err
    code, out, err = run(
        "plan",
        tiny_folder,
        "--max-kl",
        0.01,
        "--calibration-text",
        text,
        "--calibration-tokens",
        128,
        "--json",
    )
    assert code == 0
    assert "held-out" in err
    assert 0 < json.loads(out)["sparsity"] < 1
    code, _, err = run("plan", tiny_folder, "--max-kl", 0.01, "--sparsity", 0.5)
    assert code == 2
    code, out, _ = run(
        "plan", tiny_folder, "--sparsity", 0.4, "--allocator", "refined", "--calibration-text", "self",
        "--calibration-tokens", 64, "--json",
    )  # fmt: skip
    assert code == 0
    made = json.loads(out)
    assert made["rule"] == "threshold"
    assert all("threshold" in p or p["sparsity"] == 0 for p in made["projections"].values())
    assert np.isfinite([p.get("threshold", 0.0) for p in made["projections"].values()]).all()


def test_curves_of_a_file_in_compare_and_sweep(run, tiny_folder, tmp_path):
    """With the file there, allocators that use curves need no calibration text, in every command."""
    text = tmp_path / "score.txt"
    text.write_text(LONG.content)
    curves = tmp_path / "c.safetensors"
    common = (tiny_folder, "--text", text, "--sparsity", "0.5", "--tokens", 128, "--window", 64)
    both = ("--allocator", "uniform,sensitivity", "--curves", curves)
    for command in (("compare",), ("sweep", "-o", tmp_path / "s.csv", "--rule", "topk")):
        code, _, err = run(*command, *common, *both)
        assert code == 2
        assert "--calibration-text" in err
        assert not curves.exists()
    text_given = ("--calibration-text", text, "--calibration-tokens", 96)
    code, out, _ = run("compare", *common, *both, *text_given, "--json")
    assert code == 0
    assert curves.exists()
    first = json.loads(out)
    assert first[2]["arguments"]["curves"] == str(curves)
    code, out, err = run("compare", *common, *both, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)[2]["perplexity"] == first[2]["perplexity"]
    code, out, err = run(
        "sweep", "-o", tmp_path / "s.csv", "--rule", "topk", *common, *both, "--json"
    )
    assert (code, err) == (0, "")
    swept = {row["allocator"]: row for row in json.loads(out)}
    assert swept["sensitivity"]["perplexity"] == pytest.approx(first[2]["perplexity"], rel=1e-6)
    code, _, err = run("compare", *common, "--allocator", "uniform,acttail", "--curves", curves)
    assert code == 2
    assert "none of uniform, acttail uses curves" in err
    code, _, err = run(
        "sweep", "-o", tmp_path / "t.csv", *common, "--allocator", "uniform", "--rule", "threshold"
    )
    assert code == 2
    assert "uniform with rule threshold is calibrated" in err


def test_curves_of_another_model_are_found_out_before_the_dense_model_runs(monkeypatch):
    from acttail.evaluate import compare as module

    model = tiny()
    other = AllocationContext(LoadedWeights(tiny("gpt2"))).projections
    grid = np.array([0.0, 0.5, 0.99])
    monkeypatch.setattr(module, "perplexity", lambda *a, **k: pytest.fail("the model was run"))
    path = cache_dir() / "c.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    SensitivityCurves(grid, {p.name: 1 * grid for p in other}, {}).save(path)
    with pytest.raises(PlanError, match="another model"):
        module.compare(
            model, byte_tokenizer(), LONG, sparsities=[0.5],
            allocators={"uniform": {}, "sensitivity": {"curves": str(path)}},
        )  # fmt: skip
