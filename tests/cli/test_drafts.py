"""`--lossless` on the command line: the text of dense decoding, what became of the drafts, what is refused."""

import json

import numpy as np
import pytest

from acttail.base.controls import clean
from acttail.calibrate.curves import SensitivityCurves
from acttail.sparse.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.status().available, reason="no native library")


@pytest.mark.parametrize("drafts", ["both", "plan", "ngrams"])
def test_generate_says_what_the_dense_model_says(run, tiny_folder, drafts):
    common = (
        "generate",
        tiny_folder,
        "--prompt",
        "abcabc",
        "--dtype",
        "fp32",
        "--max-new-tokens",
        30,
        "--json",
    )
    code, out, _ = run(*common)
    dense = json.loads(out)
    assert code == 0
    assert dense["lossless"] is False
    sparsity = ("--sparsity", 0.5, "--allocator", "uniform")
    code, out, _ = run(*common, *sparsity, "--lossless", "--drafts", drafts)
    found = json.loads(out)
    assert (code, found["text"], found["tokens"]) == (0, dense["text"], dense["tokens"])
    assert (found["lossless"], found["sparsity"]) == (True, 0.5)
    counted = found["drafts"]
    assert counted["rounds"] + counted["plain"] + counted["accepted"] >= found["tokens"] - 1
    _, out, err = run(*common[:-1], *sparsity, "--lossless", "--drafts", drafts)
    assert out.strip() == clean(dense["text"]).strip()
    assert "lossless, drafts" in err
    assert "tokens plain" in err


def test_what_does_not_go_together_is_named(run, tiny_folder, tmp_path):
    generate = ("generate", tiny_folder, "--prompt", "a")
    for more, said in (
        (("--drafts", "plan"), "--drafts is about --lossless"),
        (("--lossless", "--drafts", "all"), "--drafts takes both, plan, ngrams"),
        (("--lossless", "--prefill", "all"), "--prefill: with --lossless"),
        (("--lossless", "--engine", "transformers"), "--lossless needs the native engine"),
        (("--lossless", "--drafts", "plan"), "there is no plan to draft with"),
    ):
        code, out, err = run(*generate, *more)
        assert code == 2
        assert said in err.splitlines()[-1]
        assert not out


def test_serve_judges_what_it_is_given_before_it_listens(run, tiny_folder, tmp_path):
    curves = tmp_path / "curves.json"
    grid = np.array([0.0, 0.5, 0.9])
    SensitivityCurves(grid, {"a": grid / 2}, {}).save(curves)
    for more, said in (
        (("--drafts", "plan"), "--drafts is about --lossless"),
        (("--lossless", "--prefill", "all"), "--prefill: with --lossless"),
        (("--lossless", "--engine", "transformers"), "--lossless needs the native engine"),
        (("--lossless", "--curves", curves), "--curves is of no use: with --lossless every text"),
        (("--lossless", "--drafts", "plan", "--port", 0), "there is no plan to draft with"),
    ):
        code, out, err = run("serve", tiny_folder, *more)
        assert code == 2
        assert said in err.splitlines()[-1]
        assert not out


def test_a_model_that_transformers_runs_is_refused(run, tiny_folder):
    code, out, err = run(
        "generate", tiny_folder, "--prompt", "a", "--lossless", "--trust-remote-code"
    )
    assert (code, out) == (2, "")
    assert "lossless decoding needs the native engine, not transformers" in err.splitlines()[-1]


def test_bench_times_it_beside_the_others(run, tiny_folder):
    short = (
        "bench",
        tiny_folder,
        "--lossless",
        "--rounds",
        1,
        "--new-tokens",
        8,
        "--prompt-tokens",
        12,
    )
    code, out, _ = run(*short, "--dtype", "fp32", "--threads", 1, "--json")
    row = json.loads(out)
    assert code == 0
    assert set(row["tokens_per_second"]) == {"sparse", "dense", "lossless"}
    drafts = row["drafts"]
    assert drafts["rounds"] + drafts["plain"] + drafts["accepted"] == 8
    assert row["lossless_ratio"]["low"] > 0
    code, out, err = run(*short, "--device", "cuda")
    assert (code, out) == (2, "")
    assert "--lossless is the native engine's" in err
