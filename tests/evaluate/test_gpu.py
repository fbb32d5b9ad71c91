"""The GPU benchmark's machinery on a CPU: the same tokens as generate, and a whole row."""

import pytest
import torch
from families import build

from acttail import make_plan, sparsify_
from acttail.errors import ActTailError
from acttail.evaluate.gpu import StaticDecoder, gpu_bench, run_gpu_bench


@pytest.mark.parametrize("sparse", [False, True])
def test_a_static_decoder_gives_what_generate_gives(sparse):
    model = build("llama").eval()
    if sparse:
        sparsify_(model, make_plan(model, 0.5, allocator="uniform"), native=True)
    prompt = torch.tensor([3, 11, 7, 20])
    decoder = StaticDecoder(model, "eager", 16)
    expected = model.generate(
        prompt[None], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
    )[0, 4:].tolist()
    assert decoder.tokens(prompt, 5) == expected
    assert decoder.tokens(prompt, 5) == expected  # the cache begins again
    with pytest.raises(ActTailError, match="do not fit"):
        decoder.round(prompt, 12)


def test_bench_leaves_the_model_dense_and_counts_bytes():
    model = build("llama").eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = make_plan(model, 0.5, allocator="uniform")
    speed, traffic = gpu_bench(
        model, plan, torch.tensor([1, 2, 3]), new_tokens=3, rounds=2, modes=("eager",)
    )
    assert set(speed.decode) == {"sparse eager", "dense eager"}
    assert traffic["sparse eager"] < traffic["dense eager"]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_whole_row(tiny_folder):
    row = run_gpu_bench(
        tiny_folder, device="cpu", dtype="float32", prompt_tokens=4, new_tokens=3, rounds=2
    )
    assert row["fastest"] == "sparse eager"
    assert set(row["ratios"]) == {"dense eager"}
    assert row["device"] == "cpu"
    assert row["bandwidth_share"]["dense eager"] > 0


@pytest.mark.parametrize(
    ("device", "words"), [("gpu", "no such device"), ("mps", "not on"), ("cuda", "no CUDA")]
)
def test_devices_that_cannot_be_had(device, words, tiny_folder):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ActTailError, match=words):
        run_gpu_bench(tiny_folder, device=device)


def test_the_command(tiny_folder, capsys):
    import sys

    from acttail.cli import main

    def run(*arguments):
        sys.argv = ["acttail", "bench", str(tiny_folder), *arguments]
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, capsys.readouterr()

    short = ("--prompt-tokens", "4", "--new-tokens", "2", "--rounds", "1", "--dtype", "fp32")
    code, shown = run("--device", "cpu", *short)
    assert code == 0
    assert "sparse eager" in shown.out
    code, shown = run("--device", "cpu", "--against", "hf")
    assert code == 2
    assert "--device takes" in shown.err
    code, shown = run("--device", "cpu", "--dtype", "int4")
    assert code == 2
    assert "int4" in shown.err


def test_a_graph_needs_a_gpu():
    with pytest.raises(ActTailError, match="CUDA graph"):
        StaticDecoder(build("llama"), "graph", 8)
