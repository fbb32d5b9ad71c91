"""Sensitivity curves against the naive formula; the budget against brute force; resume; peers."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokens import byte_tokenizer
from families import build, config
from transformers import AutoModelForCausalLM

from acttail import make_plan
from acttail.allocate import AllocationContext
from acttail.allocate.greedy import paths
from acttail.calibrate import elsewhere
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.curves import SensitivityCurves, predicted_loss
from acttail.calibrate.measure import measure
from acttail.calibrate.selftext import sample_text
from acttail.calibrate.tape import backward_by_block, fisher_objective
from acttail.calibrate.text import Text
from acttail.errors import ActTailError, ModelError, PlanError, TextError
from acttail.maths.budget import kept_entries, model_sparsity
from acttail.maths.curves import lower_hull, minimise
from acttail.model.projections import find_head, find_projections, weight_of
from acttail.model.weights import LoadedWeights
from acttail.sparse.backends import cpu, reference

TEXT = Text("calibration", "".join(chr(97 + (i * i * 7) % 26) for i in range(400)))


def tiny(family="llama", seed=0):
    cfg = config(family).__class__(**{**config(family).to_dict(), "vocab_size": 260})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(cfg, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.mul_(4)  # away from the uniform output of an untrained model
    return model


def calibration(model, tokens=96, window=32):
    return Calibration(model, byte_tokenizer(), TEXT, tokens=tokens, window=window)


@pytest.mark.parametrize("shape", [(1, 5), (7, 33), (64, 576)])
def test_native_partial_energies_equal_the_reference(shape):
    torch.manual_seed(0)
    rows, d = shape
    x = (torch.randn(rows, d) * 2).round() / 2  # full of ties
    vectors = [torch.randn(rows, d) for _ in range(3)]
    dropped = torch.tensor([0, 1, d // 2, d - 1, d])
    expected = reference.partial_energies(x, vectors, dropped)
    by_hand = torch.stack([
        torch.stack([
            0.5 * ((x - reference.topk_mask(x, d - int(n)) if n < d else x) * v).double().sum(-1).square().sum()
            for n in dropped
        ]) for v in vectors
    ])  # fmt: skip
    torch.testing.assert_close(expected, by_hand)
    if cpu.supports(x):
        torch.testing.assert_close(cpu.partial_energies(x, vectors, dropped), expected)
        with pytest.raises(RuntimeError, match="bad arguments"):
            cpu.partial_energies(x, vectors, torch.tensor([3, 2]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2-moe", "phi3"])
def test_curves_equal_the_naive_formula(family):
    """F = ½ E[(g · W (x - TopK(x)))²] with g from one ordinary backward pass and a matmul per point."""
    model = tiny(family)
    c = calibration(model)
    grid = (0.0, 0.25, 0.5, 0.9)
    curves = measure(c, grid=grid, resume=False)
    batches = c.batches()
    every = [*find_projections(model), find_head(model)]
    totals = {p.name: np.zeros(len(grid)) for p in every if p.expert is None}
    for index, ids in enumerate(batches):
        recorded = {}

        def hook(name, recorded):
            def run(module, args, output):
                output.retain_grad()
                recorded[name] = (args[0].detach(), output)

            return run

        handles = [
            model.get_submodule(p.module).register_forward_hook(hook(p.name, recorded))
            for p in every if p.expert is None
        ]  # fmt: skip
        logits = model(input_ids=ids[None], use_cache=False).logits
        generator = torch.Generator().manual_seed(index)
        _, upstream = fisher_objective(generator)(logits.detach())
        logits.backward(upstream)
        for handle in handles:
            handle.remove()
        for p in every:
            if p.expert is not None:
                continue
            x, z = recorded[p.name]
            x, g = x.reshape(-1, p.d_in), z.grad.reshape(-1, p.d_out)
            for i, s in enumerate(grid):
                lost = x - reference.topk_mask(x, kept_entries(s, p.d_in))
                totals[p.name][i] += (
                    0.5
                    * ((lost @ weight_of(model, p).T) * g).sum(-1).double().square().sum().item()
                )
    for name, total in totals.items():
        expected = np.maximum.accumulate(total / batches.numel())
        np.testing.assert_allclose(curves.curves[name], expected, rtol=2e-3, atol=1e-12)
    assert set(curves.curves) == {p.name for p in every}
    assert all((np.diff(v) >= 0).all() and v[0] == 0 for v in curves.curves.values())


def test_backward_by_block_equals_one_backward_pass():
    model = tiny()
    ids = torch.randint(3, 260, (1, 24))
    seen = {}
    backward_by_block(
        model, ids, fisher_objective(torch.Generator().manual_seed(0)),
        lambda b, s: seen.update({n: v.clone() for n, (_, v) in s.items()}),
    )  # fmt: skip
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    down = model.model.layers[0].mlp.down_proj
    kept = {}
    handle = down.register_forward_pre_hook(
        lambda m, a: kept.setdefault(
            "x", a[0].requires_grad_() if a[0].is_leaf else a[0]
        ).retain_grad()
    )
    logits = model(input_ids=ids, use_cache=False).logits
    _, upstream = fisher_objective(torch.Generator().manual_seed(0))(logits.detach())
    logits.backward(upstream)
    handle.remove()
    expected = kept["x"].grad.reshape(-1, down.in_features)
    torch.testing.assert_close(seen["model.layers.0.mlp.down_proj"], expected, rtol=1e-3, atol=1e-4)


def test_predicted_loss_is_close_to_the_measured_kl():
    """The point of the curves: one projection sparse at a time, F against the real KL."""
    from acttail import perplexity, sparsify_
    from acttail.plan import build_plan

    model = tiny()
    curves = measure(calibration(model, 320, 64), resume=False)
    weights = LoadedWeights(model)
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"):
        s = {p.name: 0.0 for p in weights.projections} | {name: 0.5}
        plan = build_plan(weights, s, sparsity=None, allocator="x", arguments={})
        sparsify_(model, plan)
        result = perplexity(
            model, byte_tokenizer(), TEXT, window=64, tokens=320, metrics=("kl", "top1")
        )
        assert 0.3 < predicted_loss(curves, s) / result.kl < 3
        assert 0 <= result.top1 <= 1


def test_minimise_beats_every_budget_on_a_grid():
    """Brute force over three projections with convex and non-convex curves."""
    grid = np.linspace(0, 0.99, 34)
    curves = {
        "a": grid**2, "b": 3 * grid**4, "c": np.maximum.accumulate(0.5 * np.sin(2 * grid) ** 2 + 0.2 * grid),
    }  # fmt: skip
    costs = {"a": 1.0, "b": 2.0, "c": 1.5}
    for target in (0.0, 0.3, 0.6, 0.9, 0.99):
        found = minimise(curves, grid, costs, target)
        assert model_sparsity(list(found.values()), list(costs.values())) == pytest.approx(
            target, abs=1e-6
        )
        value = sum(np.interp(found[n], grid, curves[n]) for n in curves)
        for a, b in itertools.product(grid[::3], repeat=2):
            c = (target * 4.5 - a - 2 * b) / 1.5
            if 0 <= c <= 0.99:
                other = sum(
                    np.interp(s, grid, curves[n]) for n, s in zip("abc", (a, b, c), strict=True)
                )
                # On the hull the optimum mixes two points of a non-convex curve.
                assert value <= other + 0.03


def test_lower_hull():
    x = np.array([0.0, 1, 2, 3, 4])
    assert lower_hull(x, np.array([0.0, 5, 1, 5, 8])).tolist() == [0, 2, 4]
    assert lower_hull(x, np.zeros(5)).tolist()[0] == 0


def test_plan_from_curves_file(tmp_path):
    model = tiny()
    path = tmp_path / "curves.safetensors"
    context = AllocationContext(LoadedWeights(model), calibration=calibration(model))
    first = make_plan(
        model, 0.5, allocator="sensitivity", arguments={"curves": str(path)}, context=context
    )
    assert first.solved_sparsity == pytest.approx(0.5, abs=1e-6)
    # With the file there, neither text nor model pass is needed for another S.
    again = make_plan(model, 0.5, allocator="sensitivity", arguments={"curves": str(path)})
    assert [p.k for p in again.projections.values()] == [p.k for p in first.projections.values()]
    loaded = SensitivityCurves.load(path)
    assert loaded.about["text"] == "calibration"
    with pytest.raises(PlanError, match="another model"):
        make_plan(build("gpt2"), 0.5, allocator="sensitivity", arguments={"curves": str(path)})
    path.write_bytes(b"junk")
    with pytest.raises(PlanError, match="cannot read curves"):
        SensitivityCurves.load(path)


def test_calibrated_rules_need_text():
    for name in ("sensitivity", "greedy"):
        with pytest.raises(TextError, match="calibrat"):
            make_plan(tiny(), 0.5, allocator=name)


def test_bad_arguments():
    c = calibration(tiny())
    with pytest.raises(ActTailError, match="unknown loss"):
        measure(c, loss="vibes")
    for grid in ((0.0, 0.5), (0.1, 0.5, 0.9), (0.0, 0.5, 0.4), (0.0, 0.5, 1.0)):
        with pytest.raises(ActTailError, match="ascends from 0"):
            measure(c, grid=grid)


def test_output_loss_is_the_relative_output_error():
    model = tiny()
    grid = (0.0, 0.5, 0.9)
    curves = measure(calibration(model, 384), loss="output", grid=grid, resume=False)
    seen = {}
    names = ("model.layers.0.mlp.down_proj", "model.layers.2.self_attn.q_proj")
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: seen.setdefault(name, []).append(
                a[0].reshape(-1, a[0].shape[-1])
            )
        )
    with torch.no_grad():
        for ids in calibration(model, 384).batches():
            model(ids[None])
        for name in names:
            x, w = torch.cat(seen[name]), model.get_submodule(name).weight
            for i, s in enumerate(grid):
                lost = x - reference.topk_mask(x, kept_entries(s, x.shape[-1]))
                exact = float((lost @ w.T).square().sum() / (x @ w.T).square().sum())
                assert curves.curves[name][i] == pytest.approx(exact, rel=0.35, abs=1e-9)


def test_resume_after_a_stop_gives_the_same_curves():
    model = tiny()

    class StopNowError(Exception):
        pass

    def stop_after_first(done, total):
        if done == 1:
            raise StopNowError

    c = calibration(model)
    whole = measure(c, resume=False)
    with pytest.raises(StopNowError):
        measure(replace(c, progress=stop_after_first))
    steps = []
    resumed = measure(replace(c, progress=lambda done, total: steps.append(done)))
    assert steps == [2, 3]
    for name in whole.curves:
        np.testing.assert_array_equal(whole.curves[name], resumed.curves[name])


@pytest.mark.slow
def test_kill_at_random_moments_and_resume(tmp_path):
    """kill -9 six times (scripts/kill.py: twenty), then run to the end: bit for bit the undisturbed curves."""
    code = f"""
import sys
sys.path[:0] = {[str(p) for p in Path(__file__).parents[:2]]!r}
from test_sensitivity import tiny, calibration
from acttail.calibrate.measure import measure
print("ready", flush=True)
measure(calibration(tiny(), 384)).save(sys.argv[1])
"""

    def run(cache, output, kill_after=None):
        env = {**os.environ, "ACTTAIL_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(output)], env=env, stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        if kill_after is not None:
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        process.wait()

    run(tmp_path / "a", tmp_path / "a.safetensors")
    rng = np.random.default_rng(0)
    for _ in range(6):
        run(tmp_path / "b", tmp_path / "b.safetensors", kill_after=rng.uniform(0, 0.6))
    run(tmp_path / "b", tmp_path / "b.safetensors")
    a, b = (SensitivityCurves.load(tmp_path / f"{n}.safetensors") for n in "ab")
    for name in a.curves:
        np.testing.assert_array_equal(a.curves[name], b.curves[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_greedy_path(family):
    model = tiny(family)
    c = calibration(model)
    found = paths(c, 32)
    assert len(found) == 3
    for path in found:
        states = np.array(path.states)
        assert (states[0] == 0).all()
        assert (states[-1] == 0.99).all()
        steps = np.diff(states, axis=0)
        assert ((steps > 0).sum(1) == 1).all()
        assert steps.max() <= 0.05 + 1e-9
    context = AllocationContext(LoadedWeights(model), calibration=c)
    for target in (0.0, 0.45, 0.8, 0.99):
        plan = make_plan(
            model, target, allocator="greedy", arguments={"tokens": 32}, context=context
        )
        assert plan.solved_sparsity == pytest.approx(target, abs=1e-3)
        for b in range(3):
            entries = [p for p in plan.projections.values() if p.block == b]
            mean = model_sparsity([p.sparsity for p in entries], [p.cost for p in entries])
            assert mean == pytest.approx(target, abs=1e-3)


def test_greedy_takes_the_cheapest_first_step():
    """Against a plain loop over the block's projections, each tried alone."""
    model = tiny()
    c = calibration(model)
    path = paths(c, 32)[1]
    ids = c.batches()[:1, :32]
    block = model.model.layers[1]
    seen = {}
    handle = block.register_forward_pre_hook(
        lambda m, a, k: seen.update(a=a, k=k), with_kwargs=True
    )
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()

    def output():
        with torch.no_grad():
            return block(*seen["a"], **seen["k"])

    target = output()
    rise = {}
    for p in find_projections(model):
        if p.block == 1:
            k = kept_entries(0.05, p.d_in)
            hook = model.get_submodule(p.module).register_forward_pre_hook(
                lambda m, a, k=k: (reference.topk_mask(a[0], k),)
            )
            rise[p.name] = float((output() - target).square().sum()) / (p.cost * 0.05)
            hook.remove()
    first = path.names[int(np.argmax(path.states[1]))]
    assert rise[first] == pytest.approx(min(rise.values()), rel=1e-3)


def test_greedy_resumes_by_block(tmp_path):
    model = tiny()
    c = calibration(model)
    first = paths(c, 32)
    files = sorted((tmp_path / "cache" / "greedy").rglob("*.json"))
    assert len(files) == 3
    files[1].unlink()
    assert paths(c, 32) == first


def test_self_text():
    model = tiny()
    a, b = (sample_text(model, byte_tokenizer(), tokens=64, seed=s) for s in (0, 0))
    assert a == b
    assert a != sample_text(model, byte_tokenizer(), tokens=64, seed=1)
    assert a.name.startswith("self@")


def load_again(folder):
    """A model as another process loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def saved(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def bits(curves):
    return {name: curve.tobytes() for name, curve in curves.curves.items()}


@pytest.mark.parametrize("loss", ["fisher", "output", "kl"])
def test_windows_in_any_order_give_the_same_bits(saved, monkeypatch, loss):
    """Through the same door as a cluster, whose tasks end as they please."""
    c = calibration(load_again(saved))
    alone = measure(c, loss=loss, resume=False)

    @contextmanager
    def backwards(work, **asked):
        assert asked["threads"] == torch.get_num_threads()
        yield lambda todo: (
            (key, work(*todo[key], threads=asked["threads"])) for key in sorted(todo, reverse=True)
        )

    monkeypatch.setattr(elsewhere, "runner", backwards)
    away = replace(c, elsewhere=elsewhere.Elsewhere("local", partial(load_again, saved)))
    assert bits(measure(away, loss=loss, resume=False)) == bits(alone)
    with torch.no_grad():
        away.model.lm_head.weight[3] += 1e-3
    with pytest.raises(ModelError, match="other weights"):
        measure(away, loss=loss, resume=False)


@pytest.mark.slow
def test_a_cluster_gives_the_same_bits(tiny_folder, text_file, tmp_path, monkeypatch, run):
    """`plan --ray` on a cluster of two nodes writes the file of curves that one process writes, and the same plan."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    asked = (
        "plan", tiny_folder, "--sparsity", "0.5", "--allocator", "sensitivity", "--dtype", "fp32",
        "--calibration-text", text_file, "--calibration-tokens", "1024",
    )  # fmt: skip
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert run(*asked, "--curves", one, "-o", tmp_path / "one.json")[0] == 0
    monkeypatch.setenv("ACTTAIL_CACHE", str(tmp_path / "another"))
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        cluster.add_node(num_cpus=1)
        code, _, err = run(
            *asked, "--curves", two, "-o", tmp_path / "two.json", "--ray", cluster.address
        )
        assert code == 0, err
    finally:
        cluster.shutdown()
    alone, away = SensitivityCurves.load(one), SensitivityCurves.load(two)
    assert int(alone.about["tokens"]) >= 8 * int(
        alone.about["window"]
    )  # there was something to share out
    assert (bits(away), away.about) == (bits(alone), alone.about)
    made = [json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two")]
    assert made[0]["projections"] == made[1]["projections"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "--ray: curves are what a cluster measures, and acttail needs none to be measured"),
        (("--allocator", "sensitivity", "--device-map", "auto"), "leave out --device-map"),
    ],
)
def test_what_a_cluster_has_no_part_in(run, tiny_folder, text_file, arguments, why):
    pytest.importorskip("ray")
    if "sensitivity" in arguments:
        arguments = (*arguments, "--calibration-text", text_file)
    code, _, err = run("plan", tiny_folder, "--sparsity", "0.5", "--ray", "local", *arguments)
    assert code == 2
    assert why in err
