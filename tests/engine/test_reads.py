"""A budget in bytes: the plan reads the share that was asked for, by the accounting and by the kernels' own count."""

from statistics import fmean

import pytest
import torch
from families import build, config
from transformers import AutoModelForCausalLM

from acttail.allocate import AllocationContext, make_plan
from acttail.allocate.goal import Goal, Price
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.text import Text
from acttail.engine import Engine
from acttail.engine.accounting import packed_bytes
from acttail.engine.config import EngineConfig
from acttail.engine.reads import READ_SHARE, read_goal
from acttail.errors import BudgetError
from acttail.evaluate.request import PlanRequest, requested
from acttail.evaluate.speed import bytes_per_token
from acttail.model.opened import open_model
from acttail.model.projections import HEAD
from acttail.model.weights import LoadedWeights
from acttail.sparse.backends import cpu

native = pytest.mark.skipif(not cpu.status().available, reason="no native library")
TEXT = Text("words", "The quick brown fox jumps over the lazy dog and runs. " * 200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Wide enough that rounding to whole inputs is small, with a head that is a fifth of all."""
    found = tmp_path_factory.mktemp("models") / "wide"
    cfg = config("llama").__class__(**{
        **config("llama").to_dict(), "vocab_size": 512, "hidden_size": 256, "intermediate_size": 640,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    })  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(cfg).save_pretrained(found)
    tokenizer.save_pretrained(found)
    return found


def shares(folder, plan, dtype):
    """(share by the accounting, share as the kernels count), weights alone.

    What a dense kernel reads besides, where a projection keeps nearly all inputs, is the engine's choice, not the plan's.
    """
    engine = Engine.from_pretrained(str(folder), plan, dtype=dtype, native=True)
    dense = Engine.from_pretrained(str(folder), None, dtype=dtype, native=True)
    whole = packed_bytes(dense.packed).dense
    cache = bytes_per_token(dense, 8) - whole
    counted = (bytes_per_token(engine, 8) - cache) / whole
    planned = packed_bytes(engine.packed, plan).sparse
    taken = packed_bytes(engine.packed, plan, dense_kernel=engine.decoder.dense_kernel).sparse
    return planned / whole, counted - (taken - planned) / whole


@native
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("allocator", ["acttail", "uniform"])
def test_the_share_that_was_asked_for_is_read(folder, dtype, allocator):
    asked = PlanRequest(read_share=0.7, allocator=allocator, engine=EngineConfig(dtype))
    plan = requested(open_model(folder), asked).plan
    accounted, counted = shares(folder, plan, dtype)
    assert accounted == pytest.approx(0.7, abs=4e-3)
    assert counted == pytest.approx(accounted, abs=1e-3)
    # Both are said: S, of the weights, and the share, of the bytes.
    assert plan.notes[READ_SHARE].startswith(f"{accounted:.4f} of the ")
    assert plan.sparsity == pytest.approx(plan.solved_sparsity, abs=1e-6)
    assert (
        plan.sparsity > 0.3
    )  # the head, scales and norms are read whole, so the projections give more


@native
def test_a_calibrated_budget_takes_the_head(folder):
    asked = {"read_share": 0.6, "allocator": "sensitivity", "text": TEXT, "tokens": 512, "dtype": "float32"}  # fmt: skip
    plans = {
        head: requested(open_model(folder), PlanRequest(**asked, head=head)).plan
        for head in (None, False)
    }
    assert plans[None].sparse_head is not None
    assert plans[False].head is None
    for plan in plans.values():
        accounted, counted = shares(folder, plan, "bf16")
        assert accounted == pytest.approx(0.6, abs=4e-3)
        assert counted == pytest.approx(accounted, abs=1e-3)
    blocks = [
        fmean(e.sparsity for e in p.projections.values() if e.kind != HEAD) for p in plans.values()
    ]
    assert blocks[0] < blocks[1]


def test_formats_that_differ_cost_what_they_read():
    """Where one kind costs ten times as much, that kind is dropped first."""
    model = build("llama")
    tokens = torch.randint(0, 60, (1, 64))
    dear = {
        p.name: 10.0 if p.kind == "down" else 1.0 for p in LoadedWeights(model).projections
    }  # fmt: skip
    prices = {n: Price((0.0, 1.0), (0.0, c)) for n, c in dear.items()}
    total = sum(dear.values())
    goal = Goal("half", 0.5 * total, total, 0.0, prices)
    context = AllocationContext(LoadedWeights(model))
    context.calibration = Calibration(
        model, _Ids(), Text("ids", " ".join(map(str, tokens[0].tolist()))), tokens=64, window=32
    )
    plan = make_plan(None, goal, allocator="sensitivity", context=context, head=False)
    plain = make_plan(None, plan.sparsity, allocator="sensitivity", context=context, head=False)

    def mean(found):
        values = [e.realised_sparsity for e in found.projections.values() if e.kind == "down"]
        return sum(values) / len(values)

    assert mean(plan) > mean(plain) + 0.1
    spent = sum(c * (1 - plan.projections[n].realised_sparsity) for n, c in dear.items())
    assert spent == pytest.approx(goal.wanted, rel=0.02)


class _Ids:
    """A tokenizer of numbers."""

    bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [int(x) for x in text.split()]}

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def test_a_price_that_bends_is_met():
    """A dense kernel above some density makes half of a projection cost what all of it does."""
    weights = LoadedWeights(build("llama"))
    bent = Price((0.0, 0.5, 0.6, 1.0), (0.1, 0.5, 1.0, 1.0))
    prices = {p.name: bent for p in weights.projections}
    count = len(prices)
    goal = Goal("three fifths", 0.6 * count, float(count), 0.0, prices)
    plan = make_plan(None, goal, allocator="uniform", context=AllocationContext(weights))
    cost = goal.spent(weights.projections, [e.sparsity for e in plan.projections.values()])
    # One input of 48 more is a fiftieth of a projection, and where the price is steep a tenth of its cost.
    assert cost == pytest.approx(goal.wanted, rel=0.1)
    assert 0.42 < plan.sparsity < 0.55


@pytest.mark.parametrize("share", [0, -1, 1.01, float("nan")])
def test_no_share(share):
    with pytest.raises(BudgetError, match="read share must be a number above 0"):
        PlanRequest(read_share=share)


def test_out_of_reach_says_what_is_in_reach(tiny_folder, run):
    status, _, error = run("plan", tiny_folder, "--read-share", 0.02)
    assert status == 2
    assert error.count("\n") == 1
    assert "a read share of 0.02 is out of reach: with 99% of every input dropped it is 0." in error
    assert "--head" in error


def test_the_command_says_both(tiny_folder, run, tmp_path):
    file = tmp_path / "plan.json"
    status, out, _ = run(
        "plan", tiny_folder, "--read-share", 0.8, "--engine-dtype", "int8", "-o", file
    )
    assert status == 0
    assert "sparsity 0." in out
    assert "MB that a dense token reads in int8 (0.8 was asked for)" in " ".join(out.split())
    assert run("plan", tiny_folder, "--read-share", 0.8, "--sparsity", 0.5)[0] == 2
    status, _, error = run("generate", tiny_folder, "--prompt", "The", "--plan", file, "--max-new-tokens", 2)  # fmt: skip
    assert status == 0, error


def test_a_model_for_transformers_alone(tmp_path, tokenizer):
    """What the native engine does not run is counted in transformers' dtype."""
    from acttail.engine.accounting import loaded_bytes

    model = build("neox").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "neox")
    tokenizer.save_pretrained(tmp_path / "neox")
    opened = open_model(tmp_path / "neox")
    goal = read_goal(opened, EngineConfig(), 0.8)
    assert goal.dense == pytest.approx(loaded_bytes(model).dense, rel=1e-3)
    plan = requested(opened, PlanRequest(read_share=0.8, allocator="uniform")).plan
    read = loaded_bytes(model, plan)
    assert read.sparse / read.dense == pytest.approx(0.8, abs=0.02)
