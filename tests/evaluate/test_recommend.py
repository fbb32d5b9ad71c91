"""The best of several allocators, by trying each on text that none was calibrated on."""

import json

import pytest
from test_quality import LONG, context_of
from test_request import closed, model  # noqa: F401 - fixtures
from test_sensitivity import tiny

from acttail import make_plan, perplexity, sparsify_
from acttail.allocate import AllocationContext
from acttail.errors import ActTailError, BudgetError, TextError
from acttail.evaluate.quality import held_out
from acttail.evaluate.recommend import CALIBRATED, DATA_FREE, candidates, recommend
from acttail.evaluate.request import PlanRequest, requested
from acttail.model.opened import open_model
from acttail.model.weights import LoadedWeights


def test_the_least_divergence_on_held_out_text_is_taken():
    lm = tiny()
    context = context_of(lm)
    found = recommend(context, 0.5, CALIBRATED, tokens=128)
    assert [t.plan.allocator for t in found.tried] == list(CALIBRATED)
    assert found.best.kl == min(t.kl for t in found.tried) > 0
    assert all(t.plan.head is None for t in found.tried)  # equal bytes
    text = held_out(context.calibration)
    for tried in found.tried:
        sparsify_(lm, tried.plan)
        again = perplexity(
            lm, context.calibration.tokenizer, text, window=32, tokens=128, metrics=("kl",)
        )
        assert again.kl == pytest.approx(tried.kl, rel=1e-5)
    assert found.reason.startswith(f"{found.best.plan.allocator}: KL to dense {found.best.kl:.4f}")
    assert found.text == text.name in found.reason


def test_data_free_rules_are_tried_on_the_whole_text():
    context = context_of(tiny())
    found = recommend(context, 0.5, DATA_FREE, tokens=128)
    assert found.text == LONG.name
    assert {t.plan.allocator for t in found.tried} == {"acttail", "uniform"}
    same = make_plan(tiny(), 0.5, allocator=found.best.plan.allocator)
    assert same.projections == found.best.plan.projections


def test_what_there_is_nothing_to_choose_by_is_refused():
    with pytest.raises(BudgetError, match="nothing to choose"):
        recommend(context_of(tiny()), 0.0, DATA_FREE)
    with pytest.raises(TextError, match="calibration-text"):
        recommend(AllocationContext(LoadedWeights(tiny())), 0.5, DATA_FREE)
    for wrong in ({"max_kl": 0.1}, {"sparsity": 0.5, "rule": "wina"}, {"sparsity": 0.5, "head": True},
                  {"sparsity": 0.5, "allocator": "uniform"}, {"sparsity": 0.5, "arguments": {"eps": 0.1}}):  # fmt: skip
        with pytest.raises(ActTailError, match="leave out"):
            PlanRequest(**wrong, candidates=DATA_FREE)
    assert candidates(calibrated=False) == DATA_FREE


def test_a_choice_is_kept_with_the_model(model, closed):  # noqa: F811
    request = PlanRequest(0.5, candidates=DATA_FREE)
    found = requested(open_model(model), request)
    assert found.recommendation is not None
    assert found.plan == found.recommendation.best.plan
    closed()
    again = requested(open_model(model), PlanRequest(0.5, candidates=DATA_FREE))
    assert (again.plan, again.kept) == (found.plan, True)


def test_from_the_command_line(run, tiny_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(LONG.content)
    code, out, err = run("plan", tiny_folder, "--auto", "--sparsity", 0.5, "--json")
    assert code == 0, err
    assert json.loads(out)["allocator"] in DATA_FREE
    assert "KL to dense" in err
    assert "self@" in err  # the text was the model's own
    seen = ("--calibration-text", text, "--calibration-tokens", 96)
    code, out, err = run("plan", tiny_folder, "--auto", "--sparsity", 0.5, "--json", *seen)
    assert code == 0, err
    assert all(name in err for name in CALIBRATED)
    code, _, err = run(
        "generate", tiny_folder, "--sparsity", 0.5, "--allocator", "auto", "--prompt", "ab", "--max-new-tokens", 2,
    )  # fmt: skip
    assert code == 0, err
    assert "chosen by an earlier start" in err  # by plan, just now


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--sparsity", 0.5, "--allocator", "uniform"), "--auto and --allocator"),
        (("--max-kl", 0.1), "--max-kl"),
        (("--sparsity", 0), "--sparsity"),
        (("--sparsity", 0.5, "--rule", "wina"), "--rule"),
        (("--sparsity", 0.5, "--set", "eps=0.1"), "--set"),
        (("--sparsity", 0.5, "--head"), "--head"),
        (("--sparsity", 0.5, "--curves", "c.safetensors"), "--curves"),
    ],
)
def test_what_it_does_not_go_with_is_named(run, tiny_folder, arguments, named):
    code, out, err = run("plan", tiny_folder, "--auto", *arguments)
    assert code == 2
    assert named in err
    assert not out
    assert len(err.strip().splitlines()) == 1
