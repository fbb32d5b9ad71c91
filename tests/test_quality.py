"""Quality instead of sparsity; the refined rule; calibrated plans from the command line."""

import json

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from test_cli import run  # noqa: F401 - a fixture
from test_sensitivity import TEXT, calibration, tiny

from acttail import make_plan, perplexity, sparsify_
from acttail.allocate import AllocationContext
from acttail.calibrate import Calibration
from acttail.checkpoint import LoadedWeights
from acttail.errors import BudgetError, TextError
from acttail.quality import held_out, plan_for_quality
from acttail.text import Text

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
    plan = make_plan(model, 0.5, allocator="refined", context=context)
    assert plan.rule == "threshold"
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


def test_command_line(run, tiny_folder, tmp_path):  # noqa: F811
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
