"""Critical sparsity: the bisection brackets the score, each part is the part it names."""

import pytest
import torch
from byte_tokens import byte_tokenizer
from test_sensitivity import TEXT, tiny

from acttail import perplexity
from acttail.errors import ActTailError
from acttail.evaluate.critical import RULES, VECTORS, _Dropper, _dropping, critical


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("rule", ["topk", "top-p"])
def test_critical_points_keep_the_score(family, rule):
    model = tiny(family)
    found = critical(
        model, byte_tokenizer(), TEXT, keep=0.9, rule=rule, tokens=128, window=64, tolerance=0.1
    )
    kinds = {c.kind for c in found}
    assert {"model", "ffn"} <= kinds
    for c in found:
        assert 0 <= c.sparsity <= 0.99
        assert c.score >= 0.9 * c.dense_score
    vectors = {c.vector for c in found if c.kind == "ffn"}
    assert vectors == ({"input", "intermediate"} if family == "gpt2" else set(VECTORS))
    dense = perplexity(model, byte_tokenizer(), TEXT, tokens=128, window=64)
    assert 1 / dense.perplexity == pytest.approx(found[0].dense_score)


def test_gate_and_up_are_masked_before_the_product():
    """By hand on one block: drop half of the activated gate, or of up, and nothing else."""
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 48)
    for vector in ("gate", "up"):
        gate, up = mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)
        dropper = _Dropper(RULES["topk"], 0.5)
        expected = mlp.down_proj(
            (dropper(gate) if vector == "gate" else gate) * (dropper(up) if vector == "up" else up)
        )
        with _dropping(model, "ffn", vector, _Dropper(RULES["topk"], 0.5)):
            torch.testing.assert_close(mlp(x), expected)
        assert not torch.allclose(mlp(x), expected)


def test_fused_up_is_the_second_half():
    model = tiny("phi3")
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 48)
    gate, up = mlp.gate_up_proj(x).chunk(2, -1)
    expected = mlp.down_proj(_Dropper(RULES["topk"], 0.5)(up) * mlp.activation_fn(gate))
    with _dropping(model, "ffn", "up", _Dropper(RULES["topk"], 0.5)):
        torch.testing.assert_close(mlp(x), expected)


def test_bad_arguments():
    model = tiny()
    for arguments, match in (
        ({"keep": 0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"rule": "best"}, "unknown rule"),
    ):
        with pytest.raises(ActTailError, match=match):
            critical(model, byte_tokenizer(), TEXT, tokens=128, window=64, **arguments)
