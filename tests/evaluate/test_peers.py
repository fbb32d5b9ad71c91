"""The peers' rules against small independent implementations of what their papers describe."""

import copy

import numpy as np
import pytest
import torch
from families import build
from test_sensitivity import calibration, tiny
from torch import nn

from acttail import densify_, make_plan, sparsify_
from acttail.allocate import AllocationContext
from acttail.allocate.greedy import paths
from acttail.calibrate.measure import measure
from acttail.calibrate.thresholds import histogram_threshold, teal_thresholds
from acttail.errors import ActTailError, BudgetError, ModelError
from acttail.maths.budget import kept_entries
from acttail.model.projections import find_projections, gated_mlps
from acttail.model.weights import LoadedWeights
from acttail.sparse.counting import counting


def context(model, tokens=96):
    return AllocationContext(LoadedWeights(model), calibration=calibration(model, tokens))


def ids_of(model):
    return calibration(model).batches()


class CatsMLP(nn.Module):
    """CATS by its paper: x_gate = act(W_g x); entries below t are never computed; y = W_d (x_gate * W_u x)."""

    def __init__(self, mlp, t):
        super().__init__()
        self.mlp, self.t = mlp, t

    def forward(self, x):
        gate = self.mlp.act_fn(self.mlp.gate_proj(x))
        out = torch.zeros_like(x).flatten(0, -2)
        for row, (v, g) in enumerate(zip(x.flatten(0, -2), gate.flatten(0, -2), strict=True)):
            index = (g.abs() > self.t).nonzero()[:, 0]
            inner = g[index] * (self.mlp.up_proj.weight[index] @ v)
            out[row] = self.mlp.down_proj.weight[:, index] @ inner
        return out.view_as(x)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_cats_equals_its_paper(family):
    model = tiny(family)
    ids = ids_of(model)
    plan = make_plan(model, 0.3, allocator="cats", context=context(model))
    by_hand = copy.deepcopy(model)
    activated = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.gate_proj.register_forward_hook(
            lambda m, a, out, i=i, f=layer.mlp.act_fn: activated.setdefault(i, []).append(
                f(out).abs()
            )
        )
    with torch.no_grad():
        for row in ids:
            model(input_ids=row[None])
    share = plan.projections["model.layers.0.mlp.down_proj"].sparsity
    for i, layer in enumerate(by_hand.model.layers):
        values = torch.cat([v.flatten() for v in activated[i]]).numpy()
        entry = plan.projections[f"model.layers.{i}.mlp.down_proj"]
        assert entry.threshold == pytest.approx(np.quantile(values, share), rel=0.02)
        layer.mlp = CatsMLP(layer.mlp, entry.threshold)
    sparsify_(model, plan)
    with torch.no_grad(), counting(model) as counter:
        sparse = model(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(sparse, by_hand(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    realised = counter.realised()
    assert realised.projections["model.layers.0.mlp.gate_proj"] == 0
    assert realised.projections["model.layers.0.mlp.up_proj"] == pytest.approx(
        realised.projections["model.layers.0.mlp.down_proj"], abs=0.02
    )
    assert realised.model == pytest.approx(0.3, abs=0.05)


def test_cats_obeys_a_prefill_policy_and_leaves_no_hook():
    model = tiny()
    ids = ids_of(model)[:1]
    with torch.no_grad():
        dense = model(input_ids=ids).logits
    plan = make_plan(model, 0.35, allocator="cats", context=context(model))
    sparsify_(model, plan, prefill="first_dense=8")
    with torch.no_grad(), counting(model) as counter:
        sparse = model(input_ids=ids).logits
    torch.testing.assert_close(sparse[:, :8], dense[:, :8])
    assert not torch.allclose(sparse[:, 8:], dense[:, 8:])
    assert 0 < counter.realised().model < 0.35
    densify_(model)
    assert not any(m._forward_hooks for m in model.modules())


def test_cats_says_what_it_cannot_do():
    model = tiny()
    with pytest.raises(BudgetError, match="cats reaches a model sparsity of 0"):
        make_plan(model, 0.9, allocator="cats", context=context(model))
    fused = tiny("phi3")
    with pytest.raises(ModelError, match="gate, up and down"):
        make_plan(fused, 0.2, allocator="cats", context=context(fused))
    with pytest.raises(ActTailError, match="rule of its own"):
        make_plan(model, 0.2, allocator="cats", rule="topk", context=context(model))


def test_wina_equals_its_paper():
    """Keep the k inputs of largest |x_j| * ||W[:, j]||_2."""
    model = tiny()
    layer = model.model.layers[1].mlp.down_proj
    weight = layer.weight.detach().clone()
    sparsify_(model, make_plan(model, 0.5, allocator="wina"))
    x = torch.randn(5, weight.shape[1])
    k = kept_entries(0.5, weight.shape[1])
    expected = []
    for row in x.double().numpy():
        score = np.abs(row) * np.linalg.norm(weight.double().numpy(), axis=0)
        kept = np.argsort(-score)[:k]
        expected.append(weight.double().numpy()[:, kept] @ row[kept])
    with torch.no_grad():
        np.testing.assert_allclose(layer(x).numpy(), np.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("s", [0.2, 0.5, 0.9])
def test_teal_threshold_is_its_formula(s):
    """icdf(1/2 + s/2); for a Laplace law of scale 1 that is -ln(1 - s)."""
    rng = np.random.default_rng(0)
    x = rng.laplace(size=400_000)
    t = histogram_threshold(torch.from_numpy(x), s)
    assert t == pytest.approx(-np.log(1 - s), rel=0.02)
    assert t == pytest.approx(np.quantile(x, 0.5 + s / 2), rel=0.01)
    skewed = rng.exponential(size=100_000) - 0.3  # not symmetric: the formula still decides
    assert histogram_threshold(torch.from_numpy(skewed), s) == pytest.approx(
        np.quantile(skewed, 0.5 + s / 2), rel=0.01
    )


def test_teal_thresholds_come_from_the_dense_model():
    model = tiny()
    name = "model.layers.2.mlp.gate_proj"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        for row in ids_of(model):
            model(input_ids=row[None])
    handle.remove()
    found = teal_thresholds(calibration(model), {name: 0.6})
    values = torch.cat([v.flatten() for v in seen]).numpy()
    assert found[name]["threshold"] == pytest.approx(np.quantile(values, 0.8), rel=0.02)
    plan = make_plan(model, 0.5, allocator="greedy", rule="teal", context=context(model))
    assert plan.rule == "threshold"


def test_greedy_is_as_good_as_the_plain_loop(tmp_path, monkeypatch):
    """TEAL's algorithm 1 with nothing lazy: at every step try every projection, take the cheapest."""
    monkeypatch.setenv("ACTTAIL_CACHE", str(tmp_path))
    model = tiny()
    c = calibration(model, tokens=32)
    ids = c.batches()[:1]
    path = paths(c, 32)[0]
    block = model.model.layers[0]
    caught = {}
    handle = block.register_forward_pre_hook(
        lambda m, a, k: caught.update(args=a, kwargs=k), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    modules = {
        p.name: model.get_submodule(p.module) for p in find_projections(model) if p.block == 0
    }
    cost = {n: m.weight.numel() for n, m in modules.items()}

    def error(levels):
        def masking(s):
            def hook(module, args):
                x = args[0]
                k = kept_entries(s, x.shape[-1])
                return (x * torch.zeros_like(x).scatter(-1, x.abs().topk(k, dim=-1).indices, 1.0),)

            return hook

        handles = [modules[n].register_forward_pre_hook(masking(s)) for n, s in levels.items()]
        with torch.no_grad():
            out = block(*caught["args"], **caught["kwargs"])
        for h in handles:
            h.remove()
        return out[0] if isinstance(out, tuple) else out

    dense = error(dict.fromkeys(modules, 0.0))

    def loss(levels):
        return float((error(levels) - dense).square().sum())

    level, current = dict.fromkeys(modules, 0.0), 0.0
    total = sum(cost.values())
    while sum(cost[n] * s for n, s in level.items()) / total < 0.5:
        tried = {}
        for n in modules:
            higher = min(round(level[n] + 0.05, 6), 0.99)
            if higher > level[n]:
                tried[n] = (loss({**level, n: higher}) - current) / (cost[n] * (higher - level[n]))
        best = min(tried, key=tried.get)
        level[best] = min(round(level[best] + 0.05, 6), 0.99)
        current = loss(level)
    reached = sum(cost[n] * s for n, s in level.items()) / total
    ours = dict(
        zip(path.names, path.at(reached, np.array([cost[n] for n in path.names])), strict=True)
    )
    assert loss(ours) <= 1.1 * current


def test_larosa_split():
    model = build("llama")
    plan = make_plan(model, 0.5, allocator="larosa")
    found = {p.kind: p.sparsity for p in plan.projections.values()}
    assert found["down"] / found["gate"] == pytest.approx(1.5)
    assert found["o"] == found["down"]
    assert found["q"] == found["up"]
    assert plan.solved_sparsity == pytest.approx(0.5, abs=1e-6)
    assert (
        max(p.sparsity for p in make_plan(model, 0.9, allocator="larosa").projections.values())
        <= 0.99
    )


def test_ffn_only_is_percentiles_of_the_ffn_inputs():
    """Dhar et al.: thresholds at a percentile of |x|, the FFN alone."""
    model = tiny()
    plan = make_plan(model, 0.4, allocator="ffn-only", context=context(model))
    assert {p.kind for p in plan.projections.values() if p.threshold is not None} == {
        "gate",
        "up",
        "down",
    }
    sparsify_(model, plan)
    with torch.no_grad(), counting(model) as counter:
        for row in ids_of(model):
            model(input_ids=row[None])
    share = plan.projections["model.layers.0.mlp.up_proj"].sparsity
    for name, value in counter.realised().projections.items():
        assert value == pytest.approx(share if ".mlp." in name else 0, abs=0.03)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kl_curves_equal_brute_force(family):
    model = tiny(family)
    c = calibration(model)
    grid = (0.0, 0.5, 0.9)
    curves = measure(c, loss="kl", grid=grid, resume=False)
    last = [p for p in find_projections(model) if p.block == 1]
    ids = c.batches()
    with torch.no_grad():
        dense = torch.log_softmax(model(input_ids=ids).logits, -1)
        for p in last:
            for point, s in enumerate(grid[1:], 1):
                k = kept_entries(s, p.d_in)

                def mask(module, args, k=k):
                    x = args[0]
                    return (x * torch.zeros_like(x).scatter(-1, x.abs().topk(k, -1).indices, 1.0),)

                handle = model.get_submodule(p.module).register_forward_pre_hook(mask)
                sparse = torch.log_softmax(model(input_ids=ids).logits, -1)
                handle.remove()
                kl = float((dense.exp() * (dense - sparse)).sum(-1).mean())
                # Later points are made monotone.
                assert curves.curves[p.name][point] >= kl * (1 - 1e-3) - 1e-7
                if point == 1:
                    assert curves.curves[p.name][point] == pytest.approx(
                        max(kl, 0), rel=1e-3, abs=1e-6
                    )
    assert not any("forward" in vars(m) for m in model.modules())


def test_gated_mlps_are_found():
    assert len(gated_mlps(find_projections(build("llama")))) == 3
    assert gated_mlps(find_projections(build("gpt2"))) == []
