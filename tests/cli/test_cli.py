"""The command line: JSON alone on stdout, one line and exit 2 on bad input, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from acttail.sparse.backends import cpu


def test_analyze(run, tiny_folder, tmp_path):
    code, out, _ = run("analyze", tiny_folder, "--json", "-o", tmp_path / "alpha.json")
    records = json.loads(out)
    assert code == 0
    assert len(records) == 21
    keys = {"projection", "block", "kind", "d_in", "d_out", "cost", "alpha", "xmin", "ks_distance",
            "tail_size", "stderr"}  # fmt: skip
    assert keys <= set(records[0])
    assert json.loads((tmp_path / "alpha.json").read_text()) == records
    code, out, _ = run("analyze", tiny_folder, "--estimator", "farms")
    assert code == 0
    assert "gate" in out


def test_plan_eval_generate(run, tiny_folder, tmp_path, text_file):
    plan = tmp_path / "plan.json"
    code, out, _ = run(
        "plan", tiny_folder, "--sparsity", "0.6", "--set", "epsilon=0.05", "-o", plan
    )
    assert code == 0
    assert "epsilon=0.05" in out
    assert json.loads(plan.read_text())["arguments"]["epsilon"] == 0.05
    nll = tmp_path / "nll.npy"
    code, out, _ = run(
        "eval", tiny_folder, "--plan", plan, "--text", text_file, "--window", 64, "--json",
        "--save-nll", nll, "--seed", 7,
    )  # fmt: skip
    row = json.loads(out)
    keys = {"model", "allocator", "sparsity", "realised_sparsity", "perplexity", "perplexity_stderr",
            "nll", "tokens", "window", "dtype", "prefill", "seconds"}  # fmt: skip
    assert keys <= set(row)
    assert code == 0
    assert row["allocator"] == "acttail"
    assert row["realised_sparsity"] == pytest.approx(0.6, abs=0.02)
    assert set(row["projections"]) == set(json.loads(plan.read_text())["projections"])
    assert (
        0
        < row["bytes_per_token"]["lm_head"]
        < row["bytes_per_token"]["sparse"]
        < row["bytes_per_token"]["dense"]
    )
    losses = np.load(nll)
    assert losses.shape == (row["windows"], 63)
    assert losses.mean() == pytest.approx(row["nll"], rel=1e-5)
    code, out, _ = run(
        "generate", tiny_folder, "--plan", plan, "--prompt", "abc", "--max-new-tokens", 5, "--json"
    )
    made = json.loads(out)
    assert code == 0
    assert made["engine"] in ("native", "transformers")
    assert 1 <= made["tokens"] <= 5
    code, out, _ = run(
        "generate", tiny_folder, "--plan", plan, "--prompt", "abc", "--max-new-tokens", 5, "--json",
        "--engine", "transformers", "--dtype", "float32",
    )  # fmt: skip
    other = json.loads(out)
    assert other["engine"] == "transformers"
    code, out, _ = run(
        "generate", tiny_folder, "--plan", plan, "--prompt", "abc", "--max-new-tokens", 5, "--json",
        "--dtype", "fp32",
    )  # fmt: skip
    assert json.loads(out)["text"] == other["text"]
    code, out, err = run("generate", tiny_folder, "--prompt", "abc", "--max-new-tokens", 3)
    assert "tokens/s" in err


def test_compare(run, tiny_folder, tmp_path, text_file):
    page = tmp_path / "page.html"
    code, out, _ = run(
        "compare", tiny_folder, "--sparsity", "0.3,0.6", "--allocator", "uniform,acttail,depth",
        "--set", "depth.epsilon=-0.2", "--text", text_file, "--window", 64, "--json", "--report", page,
    )  # fmt: skip
    rows = json.loads(out)
    assert code == 0
    assert [r["allocator"] for r in rows] == [None, *["uniform", "acttail", "depth"] * 2]
    assert rows[0]["ratio_to_uniform"] is None
    assert rows[1]["ratio_to_uniform"] == 1
    assert rows[3]["arguments"] == {"epsilon": -0.2}
    html = page.read_text()
    assert "<svg" in html
    assert "http" not in html.replace("http-equiv", "")
    code, out, _ = run("compare", tiny_folder, "--text", text_file, "--window", 64)
    assert code == 0
    assert "uniform" in out
    assert "±" in out


def test_plan_from_given_sparsities_and_diff(run, tiny_folder, tmp_path):
    a, b, given = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "given.json"
    run("plan", tiny_folder, "--sparsity", 0.5, "--allocator", "uniform", "-o", a)
    names = json.loads(a.read_text())["projections"]
    given.write_text(json.dumps(dict.fromkeys(names, 0.25)))
    code, _, _ = run("plan", tiny_folder, "--from", given, "-o", b)
    assert code == 0
    assert json.loads(b.read_text())["allocator"] == "from-file"
    code, out, _ = run("plan", "diff", a, b, "--json")
    assert code == 0
    assert all(r["difference"] == pytest.approx(-0.25) for r in json.loads(out))
    code, out, _ = run("plan", "diff", a, b)
    assert "-0.250" in out.replace("−", "-")


def test_doctor(run):
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert {"acttail", "torch", "backend", "problems"} <= set(report)
    code, out, _ = run("doctor")
    assert code == 0


def bad_inputs(folder, tmp_path, text):
    other = tmp_path / "other.json"
    short = tmp_path / "short.txt"
    short.write_text("hi")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    ev = ("eval", folder, "--window", 64)
    return {
        "unknown model": (("analyze", "./absent"), "no such file"),
        "unknown hub id": (("analyze", "nobody/absent"), "absent"),
        "sparsity 1.2": (("plan", folder, "--sparsity", 1.2, "-o", other), "1.2"),
        "sparsity NaN": (("plan", folder, "--sparsity", "nan", "-o", other), "nan"),
        "sparsity text": (("plan", folder, "--sparsity", "x", "-o", other), "sparsity"),
        "no sparsity": (("plan", folder, "-o", other), "--sparsity"),
        "compare sparsity": (("compare", folder, "--text", text, "--sparsity", "0.5,x"), "numbers"),
        "allocator": (("plan", folder, "--sparsity", 0.5, "--allocator", "best"), "best"),
        "set": (("plan", folder, "--sparsity", 0.5, "--set", "epsilon"), "KEY=VALUE"),
        "set key": (("plan", folder, "--sparsity", 0.5, "--set", "width=3"), "width"),
        "estimator": (("analyze", folder, "--estimator", "guess"), "guess"),
        "empty text": ((*ev, "--text", empty), "empty"),
        "short text": ((*ev, "--text", short), "fewer than one window"),
        "no text": ((*ev, "--text", "nowhere.txt"), "nowhere.txt"),
        "dtype": ((*ev, "--text", text, "--dtype", "int7"), "int7"),
        "prefill": ((*ev, "--text", text, "--prefill", "some"), "some"),
        "no plan": ((*ev, "--text", text, "--plan", tmp_path / "none.json"), "none.json"),
        "nll suffix": ((*ev, "--text", text, "--save-nll", tmp_path / "nll.txt"), "nll.txt"),
        "unwritable": (("analyze", folder, "-o", tmp_path / "nodir" / "x.json"), "nodir"),
        "diff": (("plan", "diff", other), "two plan files"),
        "option": (("plan", folder, "--bogus"), "bogus"),
        "empty prompt": (("generate", folder, "--prompt", ""), "prompt"),
        "no template": (("generate", folder, "--prompt", "x", "--chat"), "chat template"),
    }


CASES = [
    "unknown model", "unknown hub id", "sparsity 1.2", "sparsity NaN", "sparsity text", "no sparsity",
    "compare sparsity", "allocator", "set", "set key", "estimator", "empty text", "short text",
    "no text", "dtype", "prefill", "no plan", "nll suffix", "unwritable", "diff", "option",
    "empty prompt", "no template",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, run, tiny_folder, tmp_path, text_file):
    arguments, needle = bad_inputs(tiny_folder, tmp_path, text_file)[case]
    before = sorted(p.name for p in tmp_path.iterdir())
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert needle in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == [
        n for n in before if n != "cache"
    ]


def test_a_plan_of_another_model(run, tiny_folder, tmp_path, text_file):
    from families import build

    from acttail import make_plan

    plan = tmp_path / "plan.json"
    make_plan(build("llama", seed=3), 0.5).save(plan)
    code, out, err = run("eval", tiny_folder, "--plan", plan, "--text", text_file, "--window", 64)
    assert (code, out) == (2, "")
    assert "weights of model.layers.0.self_attn.q_proj differ" in err


def test_disk_full(run, tiny_folder, tmp_path, monkeypatch):
    """A disk that fills while the plan is written: one line, and the old plan stays whole."""
    plan = tmp_path / "plan.json"
    plan.write_text("old")
    from pathlib import Path

    def full(self, *args, **kwargs):
        with open(self, "w") as file:  # noqa: PTH123 - half of it lands
            file.write("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, out, err = run("plan", tiny_folder, "--sparsity", 0.5, "-o", plan)
    assert (code, out) == (2, "")
    assert "No space left on device" in err
    monkeypatch.undo()
    assert plan.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["plan.json"]


def test_a_really_full_disk(tiny_folder):
    """The same with the kernel's own full device."""
    if not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("no /dev/full")
    done = subprocess.run(
        [sys.executable, "-m", "acttail", "plan", str(tiny_folder), "--sparsity", "0.5", "-o", "/dev/full/x"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_no_half_file(tiny_folder, tmp_path, number):
    """Stopped in the middle of writing: the target does not exist and no temporary is left."""
    code = f"""
import sys, time
from pathlib import Path
from acttail import cli
def slow(self, *a, **k):
    open(self, "w").write("half")
    print("writing", flush=True)
    time.sleep(30)
Path.write_text = slow
sys.argv = ["acttail", "plan", {str(tiny_folder)!r}, "--sparsity", "0.5", "-o", "plan.json"]
cli.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "ACTTAIL_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert process.stdout.readline().strip() == "writing"
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []


def test_help_is_quick_and_imports_no_torch():
    code = """
import sys
from acttail import cli
sys.argv = ["acttail", "--help"]
try:
    cli.main()
except SystemExit:
    pass
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("analyze", "plan", "eval", "compare", "generate", "doctor"):
        assert command in done.stdout


def test_import_is_light():
    code = """
import sys
import acttail
assert "transformers" not in sys.modules and "matplotlib" not in sys.modules
assert set(acttail.__all__) <= set(dir(acttail))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version(run):
    from acttail import __version__

    assert run("--version")[1].strip() == f"acttail {__version__}"


@pytest.mark.skipif(not cpu.status().available, reason="no native library")
def test_convert_and_native_evaluation(run, tiny_folder, tmp_path, text_file):
    plan = tmp_path / "plan.json"
    run("plan", tiny_folder, "--sparsity", "0.5", "-o", plan)
    packed = tmp_path / "packed"
    code, out, _ = run(
        "convert", tiny_folder, "--plan", plan, "--dtype", "fp32", "-o", packed, "--json"
    )
    assert code == 0
    assert json.loads(out)["bytes"] > 0
    code, out, _ = run("generate", packed, "--prompt", "abc", "--max-new-tokens", 4, "--json")
    assert code == 0
    assert json.loads(out)["sparsity"] == 0.5
    rows = []
    for engine in ("native", "transformers"):
        code, out, _ = run(
            "eval", tiny_folder, "--plan", plan, "--text", text_file, "--window", 64, "--engine", engine,
            "--dtype", "float32", "--metrics", "perplexity,kl,top1", "--json",
        )  # fmt: skip
        assert code == 0
        rows.append(json.loads(out))
    assert rows[0]["engine"] == "native"
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=0.01)
    assert rows[0]["kl"] == pytest.approx(rows[1]["kl"], abs=0.02)
    assert rows[0]["realised_sparsity"] == pytest.approx(rows[1]["realised_sparsity"], abs=1e-6)


@pytest.mark.skipif(not cpu.status().available, reason="no native library")
def test_bench(run, tiny_folder, tmp_path):
    figure = tmp_path / "speed.svg"
    code, out, _ = run(
        "bench", tiny_folder, "--dtype", "int8", "--rounds", 2, "--new-tokens", 3, "--prompt-tokens", "9,20",
        "--against", "hf", "--plot", figure, "--json",
    )  # fmt: skip
    row = json.loads(out)
    assert code == 0
    assert set(row["tokens_per_second"]) == {"sparse", "dense", "hf"}
    for ratio in row["ratios"].values():
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert row["bytes_per_token"]["sparse"] < row["bytes_per_token"]["dense"]
    assert len(row["contexts"]) == 2
    assert figure.read_text().lstrip().startswith("<?xml")
    code, out, err = run(
        "bench", tiny_folder, "--rounds", 1, "--new-tokens", 2, "--prompt-tokens", 9
    )
    assert code == 0, err
    assert "by turns" in out


def test_engine_errors_are_one_line(run, tiny_folder, tmp_path):
    cases = [
        (("bench", tiny_folder, "--against", "vllm"), "--against takes"),
        (("bench", tiny_folder, "--plan", "a", "--sparsity", 0.5), "leave it out"),
        (("bench", tiny_folder, "--dtype", "fp8"), "unknown dtype"),
        (("convert", tiny_folder, "--dtype", "fp8", "-o", tmp_path / "x"), "unknown engine dtype"),
        (("generate", tiny_folder, "--prompt", "a", "--engine", "vllm"), "unknown engine"),
        (("generate", tiny_folder, "--prompt", "a", "--dtype", "int8", "--engine", "transformers"), "native"),
        (("generate", tiny_folder, "--prompt", "a", "--temperature", 999), "temperature"),
    ]  # fmt: skip
    for arguments, expected in cases:
        code, out, err = run(*arguments)
        assert code == 2, arguments
        assert expected in err
        assert len(err.strip().splitlines()) == 1
        assert not out
    assert not (tmp_path / "x").exists()


@pytest.fixture
def sparse_folder(tiny_folder, tmp_path):
    """The tiny model as a sparse checkpoint whose prompts are dense."""
    from acttail import load, make_plan, sparsify_

    model, tokenizer = load(tiny_folder, dtype="float32")
    sparsify_(model, make_plan(model, 0.5), prefill="decode_only")
    model.save_pretrained(tmp_path / "sparse")
    tokenizer.save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_a_sparse_checkpoint_stays_sparse(run, sparse_folder, engine, text_file):
    code, out, _ = run(
        "generate", sparse_folder, "--prompt", "abc", "--max-new-tokens", 3, "--json", "--engine", engine,
        "--dtype", "float32",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["sparsity"] == 0.5
    engine = "native" if engine == "auto" and cpu.status().available else "transformers"
    for asked, policy in (([], "decode_only"), (["--prefill", "all"], "all")):
        code, out, _ = run(
            "eval", sparse_folder, "--text", text_file, "--window", 64, "--json", "--dtype", "float32",
            "--engine", engine, *asked,
        )  # fmt: skip
        assert code == 0
        assert json.loads(out)["prefill"] == policy


@pytest.mark.skipif(not cpu.status().available, reason="no native library")
def test_a_rule_the_kernels_do_not_know(run, tiny_folder, tmp_path):
    from acttail import make_plan

    data = make_plan(str(tiny_folder), 0.3, allocator="uniform").to_dict() | {"rule": "cats"}
    for name, entry in data["projections"].items():
        if name.endswith(("up_proj", "down_proj")):
            entry["threshold"] = 0.01
    plan = tmp_path / "cats.json"
    plan.write_text(json.dumps(data))
    for arguments in (
        ("convert", tiny_folder, "--plan", plan, "-o", tmp_path / "packed"),
        ("generate", tiny_folder, "--plan", plan, "--prompt", "abc", "--engine", "native"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.strip().count("\n") == 0
        assert "does not run plans of the rule cats" in err
    assert not (tmp_path / "packed").exists()
    code, out, err = run(
        "generate", tiny_folder, "--plan", plan, "--prompt", "abc", "--max-new-tokens", 3, "--json"
    )
    assert code == 0
    assert json.loads(out)["engine"] == "transformers"
    assert "rule cats" in " ".join(err.split())
