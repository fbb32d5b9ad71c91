"""ReLU put into a model: exactly where it belongs, out again, and a folder that computes it or refuses."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from adapting import TEXT, lively, settings
from families import FAMILIES, build
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

import acttail
from acttail import densify_
from acttail.adapt import run
from acttail.adapt.relu import STAGES, Relu, Swap
from acttail.adapt.run import adapt
from acttail.engine import Engine
from acttail.errors import ActTailError, ModelError
from acttail.evaluate.bench import own_plan, run_bench
from acttail.evaluate.perplexity import perplexity
from acttail.model.opened import open_model
from acttail.model.relu import AFTER_NORMS, rectify_
from acttail.plan import SparsityPlan
from acttail.share import hub
from acttail.sparse.backends import cpu
from acttail.sparse.state import sparse_state

IDS = torch.arange(3, 43)[None]
# What has no place for a bias on the gate.
UNSHIFTED = {"mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "stablelm", "mixtral", "qwen2-moe", "qwen3-moe"}  # fmt: skip
native = pytest.mark.skipif(not cpu.status().available, reason="no native library")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_put_in_is_taken_out_again(family, stage):
    model = build(family)
    config, before = model.config.to_dict(), model.state_dict().copy()
    dense = logits(model)
    refused = (family in UNSHIFTED and stage == "shifted") or (family, stage) == ("opt", "stage1")
    if refused:
        with pytest.raises(ModelError, match=r"no place for a bias|has ReLU already"):
            Swap(model, Relu(stage), IDS)
    else:
        swap = Swap(model, Relu(stage), IDS)
        swapped = logits(model)
        assert not torch.equal(swapped, dense)
        with swap.original():
            assert torch.equal(logits(model), dense)
        assert torch.equal(logits(model), swapped)
        # What transformers makes of the config is the same model.
        other = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
        other.load_state_dict(model.state_dict())
        rectify_(other)
        assert torch.equal(logits(other), swapped)
        swap.undo()
    assert torch.equal(logits(model), dense)
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_numbers_of_a_block(family):
    """The MLP and the inputs of the projections, by hand."""
    model = build(family)
    before = "post_attention_layernorm" if family == "llama" else "pre_feedforward_layernorm"
    block = model.model.layers[1]
    mlp, x = block.mlp, torch.randn(5, 48)
    seen = {}
    for name, module in (
        ("q", block.self_attn.q_proj),
        ("gate", mlp.gate_proj),
        ("down", mlp.down_proj),
    ):
        module.register_forward_pre_hook(lambda m, a, name=name: seen.__setitem__(name, a[0]))
    normed = {}
    for name in ("input_layernorm", before):
        block.get_submodule(name).register_forward_hook(
            lambda m, a, o, name=name: normed.__setitem__(name, o)
        )
    swap = Swap(model, Relu("stage1"), IDS)
    assert torch.equal(mlp(x), mlp.down_proj(F.relu(mlp.gate_proj(x)) * mlp.up_proj(x)))
    logits(model)
    assert torch.equal(seen["q"], normed["input_layernorm"])
    swap.undo()
    swap = Swap(model, Relu("stage2"), IDS)
    assert torch.equal(mlp(x), mlp.down_proj(F.relu(mlp.gate_proj(x)) * mlp.up_proj(x)))
    logits(model)
    # The hook of ours came after this test's, which saw what the norm said.
    assert torch.equal(seen["q"], normed["input_layernorm"].relu())
    assert torch.equal(seen["gate"], normed[before].relu())
    assert 0.3 < float((seen["q"] == 0).float().mean()) < 0.7
    swap.undo()


def test_the_shift_is_a_quantile_and_lies_in_the_bias():
    model = build("llama")
    mlp = model.model.layers[0].mlp
    seen, gates = [], []
    mlp.gate_proj.register_forward_hook(lambda m, a, o: gates.append(o))
    logits(model)
    before = gates[-1].flatten()
    Swap(model, Relu("shifted", 0.75), IDS)
    mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    logits(model)
    (b,) = set((-mlp.gate_proj.bias).tolist())
    assert float((before <= b).float().mean()) == pytest.approx(0.75, abs=1e-3)
    assert float((seen[0] == 0).float().mean()) == pytest.approx(0.75, abs=1e-2)
    x = torch.randn(3, 48)
    expected = mlp.down_proj(F.relu(x @ mlp.gate_proj.weight.T - b) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), expected)
    assert not mlp.up_proj.bias.any()
    assert not mlp.down_proj.bias.any()
    assert model.config.mlp_bias


def plain(folder):
    """What transformers makes of a folder in a process that knows nothing of acttail: last line of its output."""
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(sys.argv[1])\n"
        "print(m(input_ids=torch.arange(3, 43)[None]).logits.double().sum().item())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "warning"},
    )  # fmt: skip
    return ran.returncode, ran.stdout.strip().splitlines()[-1:], ran.stderr


@native
@pytest.mark.parametrize(("family", "stage"), [("llama", "stage1"), ("llama", "stage2"), ("llama", "shifted"), ("gemma3", "stage1"), ("gemma3", "stage2")])  # fmt: skip
def test_a_run_and_its_folder(family, stage, tokenizer, tmp_path):
    model = lively(family)
    dense = logits(model)
    asked = settings(train=("lora", "norm"), steps=8)
    done = adapt(model, tokenizer, None, [TEXT], asked, relu=Relu(stage))
    assert done.improved
    assert 0 < done.kl_after < done.kl_before
    plan = done.plan
    assert plan.exact
    assert sparse_state(model).plan == plan
    for entry in plan.projections.values():
        assert (entry.threshold == 0.0) == (entry.kind in STAGES[stage].sparse)
        assert (entry.sparsity > 0.3) == (entry.kind in STAGES[stage].sparse)
    said = logits(model)
    assert not torch.equal(said, dense)
    folder = tmp_path / "out"
    hub.save(model, tokenizer, folder)
    assert torch.equal(logits(densify_(model)), said)  # the plan drops zeros alone
    # transformers after `import acttail`, acttail itself, and its own format.
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert sparse_state(loaded).plan == plan
    assert torch.equal(logits(loaded), said)
    mine, _ = acttail.load(folder)
    assert float((logits(mine) - said).abs().max()) <= 1e-4
    # Saved without the plan it is the same model, too.
    bare = tmp_path / "bare"
    densify_(mine).save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    again, _ = acttail.load(bare)
    assert sparse_state(again) is None
    assert float((logits(again) - said).abs().max()) <= 1e-4
    for source in (folder, bare):
        engine = Engine.from_pretrained(source, dtype="fp32", native=True, threads=1)
        for decode in (True, False):
            found = engine.new_sequence(64).all_logits(IDS[0], decode=decode)
            assert float((found - said).abs().max()) <= 1e-3
    # plain transformers: the same numbers, or none.
    code, out, error = plain(folder)
    if stage == "stage2":
        assert code != 0
        assert AFTER_NORMS in error.strip().splitlines()[-1]
        with pytest.raises(ModelError, match="load it with acttail"):
            logits(AutoModelForCausalLM.from_pretrained(bare))
    else:
        assert code == 0, error
        assert float(out[0]) == pytest.approx(float(said.double().sum()), rel=1e-4)
    card = (folder / "README.md").read_text()
    assert "largest entries" not in card
    assert ("refuses it" in card) == (stage == "stage2")


@native
def test_zeros_are_not_read_and_change_nothing(tokenizer, tmp_path):
    model = lively()
    done = adapt(model, tokenizer, None, [TEXT], settings(steps=2), relu=Relu("stage2"))
    hub.save(model, tokenizer, tmp_path / "out")
    engine = Engine.from_pretrained(tmp_path / "out", dtype="fp32", native=True, threads=1)
    whole = engine.with_plan(None)
    tokens = IDS[0].tolist()
    sparse, dense = engine.new_sequence(64), whole.new_sequence(64)
    sparse.feed(IDS[0, :1])
    dense.feed(IDS[0, :1])
    read = []
    for token in tokens[1:]:
        a, b = sparse.feed(torch.tensor([token])), dense.feed(torch.tensor([token]))
        assert float((a - b).abs().max()) <= 1e-5
        read.append((sparse.weights_read, dense.weights_read))
    head = 260 * 48
    mean = [sum(r[i] for r in read) / len(read) - head for i in (0, 1)]
    assert 1 - mean[0] / mean[1] == pytest.approx(done.plan.realised_sparsity, abs=0.05)
    # Both engines' scores count what was there, not what the plan expected.
    counted = perplexity(model, tokenizer, TEXT, tokens=256, window=64).realised
    assert counted.model == pytest.approx(done.plan.realised_sparsity, abs=0.05)
    row = run_bench(
        tmp_path / "out", dtype="fp32", threads=1, prompt_tokens=(8,), new_tokens=4, rounds=1
    )
    assert row["allocator"] == "relu"
    assert 0.2 < row["realised_sparsity"] < 0.8
    assert row["realised_sparsity"] != done.plan.realised_sparsity
    assert own_plan(open_model(tmp_path / "out")) == done.plan


class StopError(Exception):
    """Of whoever stops a run."""


def test_a_stopped_run_goes_on_and_leaves_nothing_behind(tokenizer, monkeypatch):
    monkeypatch.setattr(run, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(run, "_SAVE_SHARE", 1e9)
    asked, relu = settings(train=("lora", "bias"), steps=6), Relu("shifted", 0.8)
    whole, stopped = lively(), lively()
    config, before = stopped.config.to_dict(), logits(stopped)
    expected = adapt(whole, tokenizer, None, [TEXT], asked, relu=relu)

    def progress(done, total):
        if done == 3:
            raise StopError

    with pytest.raises(StopError):
        adapt(stopped, tokenizer, None, [TEXT], asked, relu=relu, progress=progress)
    assert stopped.config.to_dict() == config
    assert torch.equal(logits(stopped), before)
    said = []
    done = adapt(stopped, tokenizer, None, [TEXT], asked, relu=relu, remark=said.append)
    assert said[0].startswith("goes on after step 2")
    assert torch.equal(logits(stopped), logits(whole))
    clocks = {"seconds": 0, "cpu_seconds": 0}
    assert dataclasses.replace(done, **clocks) == dataclasses.replace(expected, **clocks)


@pytest.mark.parametrize("stage", ["stage2", "shifted"])
def test_never_worse_than_the_swap_alone(stage, tokenizer):
    model = lively()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = settings(train=("all",), steps=50, learning_rate=1e5, evaluations=25)
    done = adapt(model, tokenizer, None, [TEXT], asked, relu=Relu(stage))
    assert not done.improved
    assert done.kl_after == done.kl_before > 0.01
    assert done.plan.exact
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--relu", "stage3"), "no ReLU called 'stage3'"),
        (("--relu", "stage1", "--zeros", "0.5"), "stage1 has none"),
        (("--relu", "shifted", "--zeros", "1.5"), "lies between 0 and 1"),
        (("--zeros", "0.5"), "--zeros is about --relu shifted"),
        ((), "--plan FILE or --relu STAGE"),
        (("--relu", "stage1", "--plan", "plan.json"), "one of the two"),
    ],
)
def test_refusals(arguments, said, run, text_file, tiny_folder, tmp_path):
    code, _, error = run(
        "adapt", tiny_folder, "--text", text_file, "-o", tmp_path / "out", *arguments
    )
    assert code == 2
    assert said in error
    assert len(error.strip().splitlines()) == 1


def _short(text_file, steps):
    """Of a run that is over at once."""
    return (
        "--text", text_file, "--steps", steps, "--window", 32, "--held-out", 64, "--train", "norm",
    )  # fmt: skip


@native
def test_the_command(run, text_file, tiny_folder, tmp_path):
    arguments = (*_short(text_file, 2), "--relu")
    code, out, error = run(
        "adapt", tiny_folder, *arguments, "stage2", "-o", tmp_path / "out", "--json"
    )
    assert code == 0, error
    said = json.loads(out)
    plan = SparsityPlan.from_dict(said["plan"])
    assert plan.arguments == {"stage": "stage2"}
    assert Engine.from_pretrained(tmp_path / "out", dtype="fp32").plan == plan
    code, out, error = run("adapt", tiny_folder, *arguments, "stage1", "-o", tmp_path / "out")
    assert code == 0, error
    assert "exact zeros on held-out tokens" in error + out
    # A model that has it is not given it again, and .acttail folders keep it.
    code, _, error = run("adapt", tmp_path / "out", *arguments, "stage1", "-o", tmp_path / "twice")
    assert code == 2
    assert "has ReLU already" in error


@native
def test_an_acttail_folder_keeps_it(run, tiny_folder, text_file, tmp_path):
    arguments = _short(text_file, 1)
    assert run("adapt", tiny_folder, *arguments, "--relu", "stage2", "-o", tmp_path / "out")[0] == 0
    assert run("convert", tmp_path / "out", "--dtype", "fp32", "-o", tmp_path / "m.acttail")[0] == 0
    want, _ = acttail.load(tmp_path / "out")
    engine = Engine.from_pretrained(tmp_path / "m.acttail")
    ids = IDS[0]
    assert (
        float((engine.new_sequence(64).all_logits(ids, decode=True) - logits(want)).abs().max())
        <= 1e-3
    )
    back, _ = acttail.load(tmp_path / "m.acttail")
    assert float((logits(back) - logits(want)).abs().max()) <= 1e-3


@pytest.mark.parametrize("damage", [{"norms": []}, {"norms": ["x y"]}, {"other": ["input_layernorm"]}, "yes", {"norms": ["absent"]}, None])  # fmt: skip
def test_a_damaged_config_is_refused(damage, tokenizer, tmp_path):
    model = lively()
    swap = Swap(model, Relu("stage2"), IDS)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    swap.undo()
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"acttail_relu": damage}))
    with pytest.raises(ActTailError, match=r"damaged|does not have|load it with acttail"):
        logits(acttail.load(tmp_path)[0])
    with pytest.raises(ActTailError):
        Engine.from_pretrained(tmp_path, dtype="fp32", native=True)
