"""A budget in time: what is made of measured times, and that a plan carries its forecast to the bench. No time is asserted."""

import pytest
from test_reads import folder, native  # noqa: F401  (a fixture)

from acttail.engine.config import EngineConfig
from acttail.engine.shapes import shape_for
from acttail.engine.tune import Crossover, measured
from acttail.errors import BudgetError
from acttail.evaluate.bench import run_bench
from acttail.evaluate.forecast import FORECAST, fit, forecast_of, priced, speed_goal
from acttail.evaluate.request import PlanRequest, requested
from acttail.model.opened import open_model
from acttail.sparse.backends.abi import NEVER


def crossover(ratios, density=1.0):
    return Crossover(shape_for("bf16", 64, 64), density, ratios, 1e-5, NEVER, {})


def test_the_line_through_uniform_budgets():
    assert fit([0.7, 0.5, 0.3], [0.9, 0.8, 0.7]) == pytest.approx((0.55, 0.5))
    # Nothing costs less than nothing.
    assert fit([0.7, 0.5, 0.3], [0.65, 0.4, 0.15])[0] == 0.0
    assert fit([0.7, 0.5, 0.3], [0.7, 0.8, 0.9])[1] > 0


def test_a_price_rises_with_what_is_kept():
    price = priced(crossover({1.0: 1.04, 0.5: 0.5, 0.35: 0.52, 0.1: 0.1}), 2.0)
    costs = [price.at(d / 20) for d in range(21)]
    assert costs == sorted(costs)
    assert costs[0] == 0.0
    assert costs[-1] == pytest.approx(2.0)
    assert price.at(0.5) == pytest.approx(1.04)  # not below what less costs


def test_above_the_crossover_it_is_the_dense_kernels_price():
    price = priced(crossover({1.0: 1.2, 0.9: 1.1, 0.8: 1.05, 0.5: 0.7}, density=0.8), 1.0)
    assert [price.at(d) for d in (0.8, 0.9, 1.0)] == [1.0, 1.0, 1.0]
    assert price.at(0.5) == pytest.approx(0.7)


@native
def test_what_the_table_lacks_is_measured_once(monkeypatch):
    shapes = [shape_for("bf16", 64, 64), shape_for("int8", 96, 64), shape_for("bf16", 64, 64)]
    first = measured(shapes)
    assert [c.shape for c in first] == shapes
    assert first[0] == first[2]

    def again(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr("acttail.engine.tune.measure", again)
    second = measured(shapes)
    for a, b in zip(first, second, strict=True):
        assert (a.density, a.seconds) == (b.density, b.seconds)
        assert a.ratios == pytest.approx(b.ratios, abs=1e-4)


@native
def test_a_plan_carries_its_forecast_to_the_bench(folder, run, tmp_path):  # noqa: F811
    """A speedup of 1 is always in reach: the plan drops what costs no time, if anything."""
    opened = open_model(folder)
    plan = requested(opened, PlanRequest(speedup=1, allocator="uniform", engine=EngineConfig("int8"))).plan  # fmt: skip
    assert FORECAST in plan.notes
    forecast = forecast_of(plan)
    assert forecast is not None
    assert forecast > 0
    assert "int8 on " in plan.notes[FORECAST]
    row = run_bench(opened, plan=plan, dtype="int8", prompt_tokens=(4,), new_tokens=2, rounds=1)
    assert row["forecast"] == forecast
    file = tmp_path / "plan.json"
    plan.save(file)
    status, out, error = run(
        "bench", folder, "--plan", file, "--dtype", "int8", "--prompt-tokens", 4, "--new-tokens", 2, "--rounds", 1
    )  # fmt: skip
    assert status == 0, error
    assert f"forecast of the plan: {forecast:.2f}x dense; measured" in " ".join(out.split())


@native
@pytest.mark.parametrize("head", [False, True])
def test_every_projection_has_its_price(folder, head):  # noqa: F811
    goal = speed_goal(open_model(folder), EngineConfig("bf16"), 1.0, head=head)
    assert ("lm_head" in goal.prices) == head
    assert all(p.saved > 0 for p in goal.prices.values())
    assert goal.fixed >= 0


@native
def test_what_no_plan_reaches_says_what_one_does(folder, run):  # noqa: F811
    status, _, error = run("plan", folder, "--speedup", 1e6)
    assert status == 2
    line = error.strip().splitlines()[-1]
    assert "a speedup of 1e+06 is out of reach: with 99% of every input dropped it is " in line


@pytest.mark.parametrize("speedup", [0.5, 0, -1, float("inf"), float("nan")])
def test_no_speedup(speedup):
    with pytest.raises(BudgetError, match="speedup must be a number of at least 1"):
        PlanRequest(speedup=speedup)


def test_a_plan_without_a_forecast_says_nothing(tiny_folder):
    plan = requested(open_model(tiny_folder), PlanRequest(0.4, allocator="uniform")).plan
    assert forecast_of(plan) is None
    assert "notes" not in plan.to_dict()


def test_a_model_for_transformers_alone_is_refused(tmp_path, tokenizer, run):
    from families import build

    build("neox").save_pretrained(tmp_path / "neox")
    tokenizer.save_pretrained(tmp_path / "neox")
    status, _, error = run("plan", tmp_path / "neox", "--speedup", 1.2)
    assert status == 2
    assert "the native engine does not run gpt_neox models" in error
