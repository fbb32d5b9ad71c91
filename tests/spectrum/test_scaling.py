"""Models larger than the machine: analysis shared out and resumed, its cost, weights kept on disk."""

import json

import numpy as np
import pytest
import torch
from families import build

import acttail
from acttail.allocate import AllocationContext, make_plan
from acttail.base.progress import spoken_seconds
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.measure import measure
from acttail.calibrate.text import Text
from acttail.errors import ActTailError, SpectrumError
from acttail.model.projections import find_projections
from acttail.model.weights import LoadedWeights, input_device
from acttail.spectrum import jobs as spectra_jobs
from acttail.spectrum.estimate import Rates, estimate, fit, matrix_bytes


def same(a, b):
    assert [f.to_dict() for f in a] == [f.to_dict() for f in b]


@pytest.mark.parametrize("estimator", ["ks", "farms"])
def test_processes_find_what_one_finds(tiny_folder, estimator):
    alone = acttail.analyze(str(tiny_folder), estimator=estimator, cache=False)
    same(acttail.analyze(str(tiny_folder), estimator=estimator, jobs=2), alone)


@pytest.mark.slow
def test_a_cluster_finds_what_one_finds(tiny_folder):
    pytest.importorskip("ray")
    alone = acttail.analyze(str(tiny_folder), cache=False)
    same(acttail.analyze(str(tiny_folder), ray_address="local"), alone)


def test_a_stopped_analysis_goes_on(tiny_folder, monkeypatch):
    real, ran = spectra_jobs.work, []

    def failing(model, name, form, keep, *, threads):
        if len(ran) == 5:
            raise KeyboardInterrupt
        ran.append(name)
        return real(model, name, form, False, threads=threads)

    monkeypatch.setattr(spectra_jobs, "work", failing)
    # One process, through the same door as many.
    arguments = {"jobs": 1, "ray_address": None}
    weights = acttail.model.opened.as_weights(str(tiny_folder))
    with pytest.raises(KeyboardInterrupt):
        spectra_jobs.shared_spectra(str(tiny_folder), weights, **arguments)
    monkeypatch.setattr(
        spectra_jobs, "work", lambda *a, threads: ran.append(a[1]) or real(*a, threads=threads)
    )
    found = spectra_jobs.shared_spectra(str(tiny_folder), weights, **arguments)
    assert len(ran) == len(set(ran)) == len(weights.projections), "nothing was computed twice"
    alone = acttail.spectrum.analysis.spectra(weights, cache=False)
    assert list(found) == list(alone)
    for name, values in alone.items():
        assert torch.equal(found[name], values)


def test_other_files_are_not_taken_for_these(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "m")
    name = str(tmp_path / "m")
    first = spectra_jobs.shared_spectra(name, acttail.model.opened.as_weights(name))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.linspace(0.5, 1.5, p.numel()).reshape(p.shape))
    model.save_pretrained(tmp_path / "m")
    spectra_jobs._opened.cache_clear()
    second = spectra_jobs.shared_spectra(name, acttail.model.opened.as_weights(name))
    assert all(not torch.equal(first[n], second[n]) for n in first)


def test_a_worker_names_what_is_wrong(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(SpectrumError, match=r"layers\.1\.mlp\.up_proj"):
        acttail.analyze(str(tmp_path / "m"), jobs=2)
    with pytest.raises(ActTailError, match="give a model's name"):
        acttail.analyze(model, jobs=2)


def test_costs_are_fitted_and_added_up():
    sizes = [512, 1024, 2048]
    cubic, square = fit(sizes, [2e-11 * n**3 + 5e-8 * n**2 for n in sizes])
    assert cubic == pytest.approx(2e-11, rel=1e-6)
    assert square == pytest.approx(5e-8, rel=1e-6)
    rates = Rates(1e-11, cubic, square, 2)
    expected = 1e-11 * 512**2 * 2048 + 2e-11 * 512**3 + 5e-8 * 512**2
    assert rates.seconds(2048, 512) == rates.seconds(512, 2048) == pytest.approx(expected)
    assert matrix_bytes(1000, 1000) == 26_000_000
    assert spoken_seconds(3) == "3 s"
    assert spoken_seconds(600) == "10 min"
    assert spoken_seconds(36_000) == "10.0 h"


def test_estimate_grows_with_the_model():
    small = estimate(find_projections(build("llama")))
    assert 0 < small.seconds < 60
    assert small.matrices == len(find_projections(build("llama")))


def test_command_line(run, tiny_folder):
    code, out, err = run("analyze", tiny_folder, "--estimate", "--json")
    assert code == 0
    assert json.loads(out)["matrices"] > 0
    assert "on this machine" in err
    code, out, _ = run("analyze", tiny_folder, "--jobs", 2, "--json", "--estimator", "ks")
    assert code == 0
    alone = acttail.analyze(str(tiny_folder), estimator="ks", cache=False)
    assert [r["alpha"] for r in json.loads(out)] == [f.fit.alpha for f in alone]
    code, _, err = run("plan", tiny_folder, "--sparsity", 0.5, "--max-memory", "8GiB", "--allocator", "sensitivity",
                       "--calibration-text", "python-docs:calibration")  # fmt: skip
    assert code == 2
    assert "DEVICE=SIZE" in err


@pytest.fixture
def on_disk(tiny_folder):
    """The tiny model with every block on disk, and the same one in memory."""
    pytest.importorskip("accelerate")
    layers = {f"model.layers.{i}": "disk" for i in range(8)}
    whole, tokenizer = acttail.load(str(tiny_folder), dtype="float32")
    count = len(whole.model.layers)
    spread = {k: v for k, v in layers.items() if int(k.split(".")[-1]) < count}
    rest = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    away, _ = acttail.load(str(tiny_folder), dtype="float32", device_map={**spread, **rest})
    assert away.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    return away, whole, tokenizer


TEXT = Text("fox", "The quick brown fox jumps over the lazy dog. " * 40)


def test_calibration_with_blocks_on_disk(on_disk):
    away, whole, tokenizer = on_disk
    assert input_device(away).type == "cpu"
    for loss in ("fisher", "output"):
        here = measure(
            Calibration(whole, tokenizer, TEXT, tokens=256, window=64), loss=loss, resume=False
        )
        there = measure(
            Calibration(away, tokenizer, TEXT, tokens=256, window=64), loss=loss, resume=False
        )
        for name, curve in here.curves.items():
            assert np.allclose(there.curves[name], curve, rtol=1e-6, atol=1e-12)
    # And the block is gone from memory again.
    assert away.model.layers[0].mlp.up_proj.weight.device.type == "meta"


@pytest.mark.parametrize("allocator", ["acttail", "sensitivity", "greedy", "wina", "refined"])
def test_plans_with_blocks_on_disk(on_disk, allocator):
    away, whole, tokenizer = on_disk
    plans, losses = [], []
    for model in (whole, away):
        calibration = Calibration(model, tokenizer, TEXT, tokens=128, window=64)
        context = AllocationContext(LoadedWeights(model), calibration=calibration)
        plan = make_plan(model, 0.5, allocator=allocator, context=context)
        acttail.sparsify_(model, plan)
        losses.append(acttail.perplexity(model, tokenizer, TEXT, tokens=256, window=64).nll)
        acttail.densify_(model)
        plans.append(plan)
    assert plans[0].projections == plans[1].projections
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_weights_on_disk_are_analysed(on_disk):
    away, whole, _ = on_disk
    same(acttail.analyze(away, cache=False), acttail.analyze(whole, cache=False))
