"""What neighbouring tokens share, against counts by hand."""

import json

import pytest
import torch
from byte_tokens import byte_tokenizer
from test_sensitivity import TEXT, tiny

from acttail import make_plan, sparsify_
from acttail.calibrate.text import tokenize
from acttail.errors import ActTailError
from acttail.evaluate.aggregated import SPANS, aggregated, reuse


def sparse(family="llama", sparsity=0.7):
    model = tiny(family)
    return sparsify_(model, make_plan(model, sparsity, allocator="uniform"))


def inputs(model, name, ids):
    """[T, d] what a sparse projection is given, after its selection."""
    module, seen = model.get_submodule(name), []
    handle = module.register_forward_pre_hook(lambda m, a: seen.append(m.acttail_rule(a[0])[0]))
    with torch.no_grad():
        model(input_ids=ids[None])
    handle.remove()
    return seen[0]


def test_aggregated_sparsity_by_hand():
    model = sparse()
    found = aggregated(model, byte_tokenizer(), TEXT, tokens=64, window=64)
    by = {(a.kind, a.tokens): a for a in found}
    assert {a.tokens for a in found} == {s for s in SPANS if s <= 64}
    ids = tokenize(TEXT, byte_tokenizer())[:64]
    names = [n for n in model.acttail_state.plan.projections if n.endswith("down_proj")]
    for span in (1, 8, 64):
        expected = []
        for name in names:
            used = inputs(model, name, ids) != 0
            for w in used.reshape(64 // span, span, -1):
                expected.append(1 - float(w.any(0).float().mean()))
        assert by["down", span].sparsity == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    plan = model.acttail_state.plan
    assert by["model", 1].sparsity == pytest.approx(plan.realised_sparsity, abs=1e-3)
    whole = [by["model", s].sparsity for s in (1, 2, 4, 8, 16, 32, 64)]
    assert whole == sorted(whole, reverse=True)
    assert by["q", 2].independent == pytest.approx(by["q", 1].sparsity ** 2, abs=1e-3)


def test_a_reusing_token_uses_what_was_loaded_and_nothing_else():
    """Token by token with a mask of one's own, block by block as a decoder would meet it."""
    model, span = sparse(), 4
    ids = tokenize(TEXT, byte_tokenizer())[:16]

    def decode(upto):
        """Logits of token `upto` when its predecessors have run as they should."""

        def hook(module, args):
            x, rule = args[0].clone(), module.acttail_rule
            for t in range(x.shape[1]):
                cycle, place = divmod(t, 2 * span)
                if place < span:
                    x[0, t] = rule(x[0, t][None])[0]
                else:
                    first = cycle * 2 * span
                    loaded = (x[0, first : first + span] != 0).any(0)
                    x[0, t] = torch.where(loaded, x[0, t], 0.0)
            return (x,)

        state = model.acttail_state
        handles = [
            model.get_submodule(n).register_forward_pre_hook(hook) for n in state.plan.projections
        ]
        rows, state.rows = state.rows, False
        with torch.no_grad():
            out = model(input_ids=ids[None, : upto + 1]).logits[0, -1]
        state.rows = rows
        for handle in handles:
            handle.remove()
        return torch.log_softmax(out, -1)

    (found,) = reuse(model, byte_tokenizer(), TEXT, [span], tokens=16, window=16)
    kl, plain = [], []
    state = model.acttail_state
    for t in [t for t in range(16) if t % (2 * span) >= span]:
        with torch.no_grad():
            own = torch.log_softmax(model(input_ids=ids[None, : t + 1]).logits[0, -1], -1)
            rows, state.rows = state.rows, False
            dense = torch.log_softmax(model(input_ids=ids[None, : t + 1]).logits[0, -1], -1)
            state.rows = rows
        kl.append(float((dense.exp() * (dense - decode(t))).sum()))
        plain.append(float((dense.exp() * (dense - own)).sum()))
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert found.kl_without == pytest.approx(sum(plain) / len(plain), rel=1e-3)
    assert found.read == pytest.approx(1 - state.plan.realised_sparsity, abs=1e-3)
    assert found.loaded == pytest.approx(found.held / (2 * span))
    assert found.loaded < found.cached < found.read < found.held


def test_refusals():
    with pytest.raises(ActTailError, match="the model is dense"):
        aggregated(tiny(), byte_tokenizer(), TEXT, tokens=64, window=64)
    with pytest.raises(ActTailError, match="do not fit twice"):
        reuse(sparse(), byte_tokenizer(), TEXT, [40], tokens=64, window=64)
    with pytest.raises(ActTailError, match="is an expert's"):
        aggregated(sparse("mixtral"), byte_tokenizer(), TEXT, tokens=64, window=64)


def test_the_command(run, tiny_folder, text_file, tmp_path):
    make_plan(str(tiny_folder), 0.5, allocator="uniform").save(tmp_path / "plan.json")
    asked = (tiny_folder, "--text", text_file, "--tokens", 64, "--window", 32, "--dtype", "fp32")
    planned = ("--plan", tmp_path / "plan.json")
    code, out, error = run("critical", *asked, *planned, "--aggregated", "--json")
    assert code == 0, error
    assert {row["tokens"] for row in json.loads(out)} == {1, 2, 4, 8, 16, 32}
    code, out, error = run("critical", *asked, *planned, "--reuse", "2,8", "--json")
    assert code == 0, error
    assert [row["tokens"] for row in json.loads(out)] == [2, 8]
    for arguments, said in (
        (planned, "--plan is about --aggregated and --reuse"),
        (("--aggregated",), "the model is dense"),
        ((*planned, "--reuse", "0"), "at least one token"),
        ((*planned, "--reuse", "some"), "--reuse"),
    ):
        code, _, error = run("critical", *asked, *arguments)
        assert code == 2
        assert said in error
