"""The sparse linear operator, and models that use it through `sparsify_(native=True)`."""

import pytest
import torch
from families import build
from transformers import AutoModelForCausalLM

from acttail import densify_, make_plan, sparsify_
from acttail.sparse.backends import cpu, reference
from acttail.sparse.ops import NATIVE_ROWS, sparse_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (33, 7), (64, 64), (576, 200)])
@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 4), (2, 9)])
def test_equals_mask_and_matmul(dtype, d_in, d_out, rows):
    torch.manual_seed(0)
    weight, bias = torch.randn(d_out, d_in).to(dtype), torch.randn(d_out).to(dtype)
    x = torch.randn(*rows, d_in).to(dtype)
    laid = cpu.to_input_major(weight)
    assert torch.equal(laid, weight)
    for k in {1, max(1, d_in // 2), d_in}:
        kept = reference.topk_mask(x, k).double()
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        for w, b in ((laid, bias), (weight, None), (laid, None), (weight, bias)):
            expected = torch.nn.functional.linear(
                kept, w.double(), b.double() if b is not None else None
            )
            got = sparse_linear(x, w, b, k)
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def test_nan_stays_visible():
    weight = cpu.to_input_major(torch.randn(8, 16))
    x = torch.randn(2, 16)
    x[1, 3] = float("nan")
    y = sparse_linear(x, weight, None, 4)
    assert torch.isfinite(y[0]).all()
    assert torch.isnan(y[1]).all()


def test_opcheck_and_gradients():
    x = torch.randn(3, 12, requires_grad=True)
    weight = torch.randn(5, 12, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    torch.library.opcheck(torch.ops.acttail.sparse_linear, (x, weight, bias, 4))
    torch.library.opcheck(torch.ops.acttail.sparse_linear, (x.detach(), weight.detach(), None, 4))
    ours = torch.autograd.grad(sparse_linear(x, weight, bias, 4).square().sum(), (x, weight, bias))
    masked = x * (reference.topk_mask(x, 4) != 0)
    plain = torch.nn.functional.linear(masked, weight, bias).square().sum()
    for a, b in zip(ours, torch.autograd.grad(plain, (x, weight, bias)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "mixtral"])
def test_models_agree_and_come_back(family, tmp_path):
    model = build(family).float().eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = make_plan(model, 0.5)
    ids = torch.randint(3, 99, (1, 20))
    sparsify_(model, plan)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        generated = model.generate(
            ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
        )
    sparsify_(model, plan, native=True)
    with torch.no_grad():
        for n in (20, NATIVE_ROWS, 1):
            torch.testing.assert_close(
                model(input_ids=ids[:, :n]).logits, expected[:, :n], atol=1e-4, rtol=1e-4
            )
        again = model.generate(
            ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
        )
    assert torch.equal(generated, again)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    densify_(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.is_contiguous()


def test_compiles_whole():
    model = build("llama").float().eval()
    sparsify_(model, make_plan(model, 0.5), native=True)
    layer = model.model.layers[0].mlp
    x = torch.randn(1, 4, 48)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
