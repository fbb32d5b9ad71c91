"""The GPU kernels without a GPU: run by Triton's interpreter, and compiled for three architectures."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from acttail.sparse.backends import reference, triton

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INSIDE, reason="run by test_under_the_interpreter")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.mark.skipif(INSIDE, reason="would start itself again")
def test_under_the_interpreter():
    """Every other test of this file, in a process whose kernels are interpreted."""
    env = os.environ | {"TRITON_INTERPRET": "1", "ACTTAIL_BACKEND": "triton"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout, done.stdout[-500:]


def rows_of(kind, rows, d, dtype):
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(rows, d, generator=generator)
    match kind:
        case "ties":
            x = (2 * x).round() / 2
        case "equal":
            x = torch.full_like(x, -1.5)
        case "zero":
            x = torch.zeros_like(x)
        case "denormal":
            x = x * 1e-41
        case "broken" if d > 8:
            x[:, 2], x[:, 5], x[0, 7] = float("nan"), float("-inf"), -float("nan")
    return x.to(dtype)


@inside
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "zero", "denormal", "broken"])
@pytest.mark.parametrize("d", [1, 65, 200])
def test_the_mask_is_the_reference_bit_for_bit(kind, d, dtype):
    x = rows_of(kind, 3, d, dtype)
    for k in sorted({1, max(1, d // 3), d}):
        found, expected = triton.topk_mask(x, k), reference.topk_mask(x, k)
        assert torch.equal(found.view(WIDTH[dtype]), expected.view(WIDTH[dtype])), k


@inside
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("k", [1, 20, 77])
def test_the_selection_is_the_union_in_ascending_order(rows, k):
    x = rows_of("ties", rows, 77, torch.float32)
    found = triton.select(x, (k,))
    kept = reference.topk_mask(x, k)
    union = (x != 0).new_zeros(77)
    for row in x:
        keys = reference.magnitude_keys(row)
        union[torch.sort(keys, descending=True, stable=True).indices[:k]] = True
    count = int(found.count[0])
    assert count == int(union.sum())
    index = found.index[0, :count].long()
    assert index.tolist() == union.nonzero().flatten().tolist()
    assert torch.equal(found.value[0, :rows, :count], kept[:, index])


def product(x, w, k, bias=None, scale=None):
    """Float64 truth; w [d_in, d_out]."""
    y = reference.topk_mask(x, k).double() @ w.double()
    y = y if scale is None else y * scale.double()
    return y if bias is None else y + bias.double()


def close(found, expected, dtype):
    # float32 sums of exact products; one rounding to the result's dtype.
    limit = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert float((found.double() - expected).abs().max()) <= limit * float(expected.abs().max())


@inside
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize(("d", "outputs", "k"), [(65, 48, 1), (200, 136, 77), (200, 136, 200)])
def test_products_with_kept_rows(dtype, rows, d, outputs, k):
    x = rows_of("random", rows, d, dtype)
    w = torch.randn(d, outputs).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    close(triton.sparse_linear(x, w.T, None, k), product(x, w, k), dtype)
    close(triton.sparse_linear(x, w.T, bias, k), product(x, w, k, bias), dtype)


@inside
@pytest.mark.parametrize("rows", [1, 4])
def test_int8_weights_with_one_scale_an_output(rows):
    x = rows_of("random", rows, 130, torch.bfloat16)
    levels = torch.randint(-127, 128, (130, 96), dtype=torch.int8)
    scale = torch.rand(96) / 100
    found = triton.sparse_linear(x, levels.T, None, 60, scale=scale)
    close(found, product(x, levels, 60, scale=scale), torch.bfloat16)


@inside
@pytest.mark.parametrize("ks", [(40, 40, 40), (90, 17, 50), (64, 128)])
@pytest.mark.parametrize("rows", [1, 3])
def test_fused_projections_share_a_selection(ks, rows):
    widths = (96, 32, 48)[: len(ks)]
    x = rows_of("random", rows, 128, torch.float32)
    w = torch.randn(128, sum(widths))
    bias = torch.randn(sum(widths))
    at = 0
    for y, k, width in zip(triton.fused_linear(x, w, ks, widths, bias), ks, widths, strict=True):
        own = slice(at, at + width)
        close(y, product(x, w[:, own], k, bias[own]), torch.float32)
        at += width


@inside
def test_a_broken_input_stays_visible():
    x = torch.ones(1, 64)
    x[0, 9] = float("nan")
    assert triton.sparse_linear(x, torch.randn(64, 32).T, None, 4).isnan().all()


@inside
def test_partial_sums_by_atomics_and_in_order_agree(monkeypatch):
    x, w = torch.randn(1, 512), torch.randn(512, 64)
    ordered = triton.sparse_linear(x, w.T, None, 256)
    assert torch.equal(ordered, triton.sparse_linear(x, w.T, None, 256))
    monkeypatch.setenv("ACTTAIL_ATOMIC", "1")
    close(triton.sparse_linear(x, w.T, None, 256), ordered.double(), torch.float32)


@inside
def test_the_operators_take_this_backend_when_it_is_forced(monkeypatch):
    import acttail.sparse.ops as ops

    calls = []
    for name in ("topk_mask", "sparse_linear"):
        real = getattr(triton, name)
        monkeypatch.setattr(triton, name, lambda *a, f=real, n=name: calls.append(n) or f(*a))
    x, w = torch.randn(2, 80), torch.randn(80, 64).T
    assert torch.equal(ops.topk_mask(x, 30), reference.topk_mask(x, 30))
    close(ops.sparse_linear(x, w, None, 30), product(x, w.T, 30), torch.float32)
    assert calls == ["topk_mask", "sparse_linear"]
    # More rows, or another layout: one masked product.
    many = torch.randn(9, 80)
    close(ops.sparse_linear(many, w, None, 30), product(many, w.T, 30), torch.float32)
    close(ops.sparse_linear(x, w.contiguous(), None, 30), product(x, w.T, 30), torch.float32)
    assert calls == ["topk_mask", "sparse_linear", "topk_mask", "topk_mask"]


@inside
def test_one_compiled_graph():
    import acttail.sparse.ops as ops

    w = torch.randn(80, 64).T
    run = torch.compile(
        lambda x: ops.sparse_linear(ops.topk_mask(x, 60) * 2, w, None, 30), fullgraph=True, backend="aot_eager"
    )  # fmt: skip
    x = torch.randn(1, 80)
    close(run(x), product(2 * reference.topk_mask(x, 60), w.T, 30), torch.float32)


@inside
def test_a_sparse_model_decodes_through_it_and_becomes_dense_again(monkeypatch):
    from families import build

    from acttail import densify_, make_plan, sparsify_

    model = build("qwen2").eval()  # q, k and v have biases
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = make_plan(model, 0.5, allocator="depth", arguments={"epsilon": 0.2})
    ids = torch.tensor([[5, 9, 2]])
    sparsify_(model, plan)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    launched = []
    real = triton.kept_product
    monkeypatch.setattr(triton, "kept_product", lambda *a, **k: launched.append(1) or real(*a, **k))
    sparsify_(model, plan, native=True)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    blocks = model.config.num_hidden_layers
    assert len(launched) == 4 * blocks  # q, k, v as one; o; gate and up as one; down
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    # With gradients the plain operator runs, which has them.
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    densify_(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert p.is_contiguous(), name


@inside
def test_members_of_a_group_are_computed_again_for_another_input():
    from acttail.sparse.layout import FusedInput

    w = torch.randn(64, 128)
    group = FusedInput(("a", "b"), w, None, (20, 30), (16, 64))
    x, z = torch.randn(1, 64), torch.randn(1, 64)
    with torch.no_grad():
        close(group("a", x), product(x, w[:, :16], 20), torch.float32)
        close(group("b", z), product(z, w[:, 64:], 30), torch.float32)
        close(group("a", x), product(x, w[:, :16], 20), torch.float32)
        x.mul_(2)  # the same tensor with other numbers
        close(group("b", x), product(x, w[:, 64:], 30), torch.float32)
        assert not group.takes(torch.randn(9, 64))
    assert not group.takes(x)  # gradients are wanted


@inside
def test_the_benchmark_calls_what_it_says(monkeypatch):
    """Every contestant of benchmarks/gpu_kernels.py but the graphs, which need a device."""
    folder = Path(__file__).parents[2] / "benchmarks"
    if not folder.exists():
        pytest.skip("no benchmarks beside the tests")
    monkeypatch.syspath_prepend(str(folder))
    import gpu_decode
    import gpu_kernels

    monkeypatch.setattr(gpu_kernels, "graph_of", lambda run: run)
    monkeypatch.setattr(
        gpu_kernels, "microseconds", lambda runs, *_: {n: r() for n, r in runs.items()}
    )
    weights = [torch.randn(64, 32) for _ in range(2)]
    found = gpu_kernels.times_of(weights, 1, 0.5, 1, None)
    assert set(found) == {"sparse", "dense", "selection", "prompt masked", "prompt dense"}
    assert [y.shape for y in found["sparse"]] == [y.shape for y in found["dense"]] == [(1, 32)] * 2
    assert gpu_decode.config("llama-3-8b", 1).num_key_value_heads == 8


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from acttail.sparse.backends import triton_linear, triton_select

def build(kernel, target, types, constants, warps):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()})
    return triton.compile(source, target=target, options={"num_warps": warps})

for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for name, bits, infinity in (("*bf16", 16, 0x7F80), ("*fp32", 32, 0x7F800000)):
        row = dict(x_ptr=name, y_ptr=name, index_ptr="*i32", value_ptr=name, count_ptr="*i32")
        form = dict(bits=bits, infinity=infinity)
        build(triton_select.mask_kernel, target, row, form | dict(block=4096), 4)
        build(triton_select.select_kernel, target, row, form | dict(lists=2, batch=2, block=1024), 1)
        for batch in (1, 4):
            for weight, scaled in ((name, False), ("*i8", True)):
                types = row | dict(weight_ptr=weight, scale_ptr="*fp32", bias_ptr=name, out_ptr="*fp32")
                constants = dict(
                    batch=batch, padded=16, scaled=scaled, biased=False, finish=False, atomic=False,
                    widen=False, block_k=32, block_n=128,
                )
                built = build(triton_linear.product_kernel, target, types, constants, 4)
                assert built.metadata.shared <= 48 << 10, built.metadata.shared
    types = dict(partial_ptr="*fp32", bias_ptr="*bf16", out_ptr="*bf16")
    build(triton_linear.reduce_kernel, target, types, dict(biased=True, block=1024), 4)
    print("built for", target.arch)
"""


@pytest.mark.slow
def test_kernels_compile_for_a100_h100_and_mi300(tmp_path):
    """Down to machine code; needs no device."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ACTTAIL_BACKEND")}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("built for") == 3


@pytest.mark.skipif(INSIDE, reason="forced already")
def test_a_backend_that_cannot_run_is_refused_by_name():
    code = "import torch; from acttail.sparse.ops import topk_mask; topk_mask(torch.ones(4), 2)"
    for name, words in (("cuda9", "no backend"), ("triton", "cannot run")):
        env = os.environ | {"ACTTAIL_BACKEND": name, "TRITON_INTERPRET": "0"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        if name == "triton" and torch.cuda.is_available():
            continue
        assert words in done.stderr, done.stderr[-500:]
