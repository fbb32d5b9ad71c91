"""A whole run: it learns, goes on after a stop, never ends worse, and is written as one model."""

import dataclasses
import json
import sys

import pytest
import torch
from adapting import TEXT, lively, planned, settings
from gguf_files import blocky, write_gguf
from transformers import AutoModelForCausalLM

from acttail import SparsityPlan, cli, densify_, make_plan, sparsify_
from acttail.adapt import run
from acttail.adapt.data import sampled
from acttail.adapt.parts import KINDS
from acttail.adapt.run import adapt
from acttail.calibrate.calibration import Calibration
from acttail.engine import Engine
from acttail.errors import ActTailError, ModelError, PlanError
from acttail.model.weights import LoadedWeights
from acttail.plan import sketch_of
from acttail.share import hub
from acttail.sparse.backends import cpu
from acttail.sparse.state import sparse_state

IDS = torch.arange(3, 43)[None]


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("train", [("bias",), ("norm",), ("lora",), ("all",), ("lora", "norm", "bias")], ids="+".join)  # fmt: skip
def test_the_sparse_model_comes_nearer_to_the_dense_one(train, tokenizer, tmp_path):
    model = lively()
    plan = planned(model)
    said = []
    asked = settings(
        train=train, steps=12, evaluations=3, learning_rate=3.0 if "bias" in train else 10.0
    )
    done = adapt(model, tokenizer, plan, [TEXT], asked, remark=said.append)
    assert done.improved
    assert done.kl_after < 0.97 * done.kl_before
    assert done.steps == 12
    assert done.tokens == 12 * 4 * 32
    assert [step for step, _ in done.history] == [4, 8, 12]
    assert min(kl for _, kl in done.history) == pytest.approx(done.kl_after, rel=1e-3)
    assert len(said) == 4
    # Another budget it is not, and the plan knows the new weights.
    assert {n: e.k for n, e in done.plan.projections.items()} == {n: e.k for n, e in plan.projections.items()}  # fmt: skip
    assert done.plan.created_with["adapted"].startswith("+".join(train))
    assert sparse_state(model).plan == done.plan
    weights = LoadedWeights(model)
    for p in weights.projections:
        assert done.plan.projections[p.name].sketch == sketch_of(weights, p)
    moved = any(done.plan.projections[n].sketch != e.sketch for n, e in plan.projections.items())
    assert moved == bool({"lora", "all"} & set(train))
    # The folder is the model, for transformers and for the native engine.
    sparsify_(model, done.plan)
    hub.save(model, tokenizer, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    assert sparse_state(loaded).plan == done.plan
    assert torch.equal(logits(loaded), logits(model))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "bit for bit" not in card
    assert done.plan.created_with["adapted"] in card
    if cpu.status().available:
        engine = Engine.from_pretrained(tmp_path / "out", dtype="fp32", native=True)
        assert engine.plan == done.plan
        for decode in (True, False):
            said_by_engine = engine.new_sequence(64).all_logits(IDS[0], decode=decode)
            assert float((said_by_engine - logits(model)[0]).abs().max()) <= 2e-3


class StopError(Exception):
    """Of whoever stops a run."""


def stopping(at):
    def progress(done, total):
        if done == at:
            raise StopError

    return progress


@pytest.mark.parametrize("train", [("lora", "norm"), ("all",)], ids="+".join)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(train, tokenizer, monkeypatch):
    monkeypatch.setattr(run, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(run, "_SAVE_SHARE", 1e9)
    asked = settings(train=train, steps=6)
    whole, stopped = lively(), lively()
    plan = planned(whole)
    before, config = state_of(stopped), stopped.config.to_dict()
    expected = adapt(whole, tokenizer, plan, [TEXT], asked)
    for at in (2, 5):
        with pytest.raises(StopError):
            adapt(stopped, tokenizer, plan, [TEXT], asked, progress=stopping(at))
        # Nothing of the run is left in the model.
        assert sparse_state(stopped) is None
        assert same(state_of(stopped), before)
        assert stopped.config.to_dict() == config
        assert all(p.requires_grad for p in stopped.parameters())
    said, seen = [], []
    done = adapt(
        stopped, tokenizer, plan, [TEXT], asked, remark=said.append, progress=lambda d, t: seen.append(d)
    )  # fmt: skip
    assert said[0] == "goes on after step 4 of a run that was stopped"
    assert seen == [5, 6]
    assert same(state_of(stopped), state_of(whole))
    clocks = {"seconds": 0, "cpu_seconds": 0}
    assert dataclasses.replace(done, **clocks) == dataclasses.replace(expected, **clocks)
    # It has served: the next one begins anew, as does one that differs in anything.
    said.clear()
    adapt(densify_(lively()), tokenizer, plan, [TEXT], asked, remark=said.append)
    assert said[0].startswith("before the first step")


def test_a_damaged_state_begins_again(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(run, "_SAVE_SHARE", 1e9)
    model, asked = lively(), settings(steps=3)
    plan = planned(model)
    with pytest.raises(StopError):
        adapt(model, tokenizer, plan, [TEXT], asked, progress=stopping(2))
    (file,) = (tmp_path / "cache" / "adapt").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    said = []
    done = adapt(model, tokenizer, plan, [TEXT], asked, remark=said.append)
    assert said[0].startswith("before the first step")
    assert done.steps == 3
    assert not file.exists()


@pytest.mark.parametrize("train", [("lora", "norm", "bias"), ("all",)], ids="+".join)
def test_never_worse_than_it_began(train, tokenizer):
    model = lively()
    plan = planned(model)
    before, config = state_of(model), model.config.to_dict()
    sparse = logits(sparsify_(model, plan))
    said = []
    asked = settings(train=train, steps=50, learning_rate=1e5, evaluations=25)
    done = adapt(model, tokenizer, plan, [TEXT], asked, remark=said.append)
    assert not done.improved
    assert done.plan == plan
    assert done.kl_after == done.kl_before
    assert done.steps < 50
    assert "stops early" in said[-1]
    assert torch.equal(logits(model), sparse)
    densify_(model)
    assert same(state_of(model), before)
    assert model.config.to_dict() == config


def test_what_rounding_undoes_counts_as_no_better(tokenizer):
    """Steps far below the last digit of bfloat16 are learnt in float32 and lost on the way out."""
    model = lively().to(torch.bfloat16)
    before = state_of(model)
    done = adapt(
        model, tokenizer, planned(model), [TEXT], settings(train=("all",), learning_rate=1e-4)
    )
    assert model.dtype == torch.bfloat16
    assert not done.improved
    densify_(model)
    assert same(state_of(model), before)


def test_the_result_has_the_dtype_of_the_checkpoint(tokenizer):
    model = lively().to(torch.bfloat16)
    done = adapt(model, tokenizer, planned(model), [TEXT], settings(steps=12))
    assert model.dtype == torch.bfloat16
    assert done.improved
    assert all(p.requires_grad for p in model.parameters())
    done.plan.check(LoadedWeights(model))


@pytest.mark.parametrize("rule", ["wina", "threshold", "cats"])
def test_other_rules_than_topk(rule, tokenizer):
    model = lively()
    calibration = Calibration(model, tokenizer, TEXT, tokens=256, window=32)
    allocator = "cats" if rule == "cats" else "uniform"
    plan = planned(model, 0.3, allocator, rule=rule, calibration=calibration)
    if rule == "cats":
        with pytest.raises(ActTailError, match="lora cannot be trained under the rule cats"):
            adapt(model, tokenizer, plan, [TEXT], settings())
    asked = settings(train=("norm",) if rule == "cats" else ("lora",), steps=10)
    done = adapt(model, tokenizer, plan, [TEXT], asked)
    assert done.improved
    assert done.plan.rule == rule


def test_minutes_bound_a_run(tokenizer, monkeypatch):
    model, seen = lively(), []
    asked = settings(steps=None, minutes=0.02, train=("norm",))
    done = adapt(
        model, tokenizer, planned(model), [TEXT], asked, progress=lambda d, t: seen.append((d, t))
    )
    assert done.steps >= 1
    assert done.seconds >= 1.2 or len(done.history) >= asked.patience
    assert {t for _, t in seen} == {1}


def test_text_of_its_own_is_sampled_once(tokenizer, monkeypatch):
    model = lively()
    first = sampled(model, tokenizer, tokens=200, seed=0)
    assert first.name.startswith("self@")
    monkeypatch.setattr(
        "acttail.adapt.data.sample_text", lambda *a, **k: pytest.fail("sampled again")
    )
    assert sampled(model, tokenizer, tokens=200, seed=0) == first
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": ()}, "nothing to train"),
        ({"train": ("loro",)}, "cannot train 'loro'"),
        ({"train": ("lora", "all")}, "all trains what lora does"),
        ({"train": ("norm", "all")}, "all trains what norm does"),
        ({"steps": None}, "so many minutes or so many steps"),
        ({"minutes": 1.0}, "so many minutes or so many steps"),
        ({"minutes": float("nan"), "steps": None}, "minutes must be a positive number"),
        ({"learning_rate": -1.0}, "learning rate must be a positive number"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"window": 1}, "a window needs at least 2 tokens"),
        ({"held_out": 8}, "fewer than one window"),
    ],
)
def test_settings_are_judged(changes, said):
    with pytest.raises(ActTailError, match=said):
        settings(**changes)


def test_lora_without_peft_names_the_extra(monkeypatch):
    monkeypatch.setattr("acttail.adapt.parts.find_spec", lambda name: None)
    with pytest.raises(ActTailError, match=r"lora needs peft: pip install 'acttail\[adapt\]'"):
        settings()
    settings(train=("norm",))


def test_a_plan_of_another_model_is_refused(tokenizer):
    model, other = lively(), lively(seed=1)
    with pytest.raises(PlanError, match="the weights of"):
        adapt(model, tokenizer, planned(other), [TEXT], settings())
    mistral = lively("mistral")
    plan = planned(mistral)
    with pytest.raises(ModelError, match="mistral models have no place for a bias"):
        adapt(mistral, tokenizer, plan, [TEXT], settings(train=("bias",)))
    assert sparse_state(mistral) is None


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["acttail", "adapt", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_the_command(tmp_path, tokenizer, monkeypatch, capfd):
    """From a GGUF file to a folder that the engine takes, its text sampled from the model."""
    source = tmp_path / "tiny.gguf"
    write_gguf(source, blocky(), tokenizer=tokenizer)
    make_plan(str(source), 0.6, allocator="uniform").save(tmp_path / "plan.json")
    text = tmp_path / "text.txt"
    text.write_text(TEXT.content)
    arguments = (
        source, "--plan", tmp_path / "plan.json", "--text", text, "--self", "--tokens", 512, "--steps", 4,
        "--window", 32, "--batch", 2, "--held-out", 64, "--train", "lora,norm", "-o", tmp_path / "out",
        "--learning-rate", 5,
    )  # fmt: skip
    assert command(monkeypatch, *arguments, "--json") == 0
    captured = capfd.readouterr()
    said = json.loads(captured.out)
    assert said["steps"] == 4
    assert [name.partition("@")[0] for name in said["texts"]] == ["text.txt", "self"]
    plan = SparsityPlan.from_dict(said["plan"])
    engine = Engine.from_pretrained(tmp_path / "out", dtype="fp32")
    assert engine.plan == plan
    # A folder that it has made is a model like any other; onto itself it is not written.
    assert command(monkeypatch, tmp_path / "out", *arguments[1:]) == 2
    assert "is the model itself" in capfd.readouterr().err


def test_every_kind_is_in_the_help():
    from typer.main import get_command

    options = get_command(cli.app).commands["adapt"].params
    (said,) = (p.help for p in options if p.name == "train")
    assert all(name in said for name in KINDS)
