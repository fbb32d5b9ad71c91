"""Sweeps: every cell once, resumed after a stop, the same in one process, several, or on Ray."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from acttail.base.temporaries import temporary_file
from acttail.errors import ActTailError
from acttail.evaluate import sweep as module
from acttail.evaluate.sweep import SweepSpec, cells, sweep


@pytest.fixture
def spec(tiny_folder, text_file):
    return SweepSpec(
        str(tiny_folder), str(text_file), str(text_file), calibration_tokens=64, tokens=128, window=64,
        dtype="float32",
    )  # fmt: skip


WANTED = cells([0.3, 0.6], ["uniform", "sensitivity"], ["topk", "wina", "threshold"])
NUMBERS = ("perplexity", "kl", "top1", "realised_sparsity")


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x["allocator"] == y["allocator"]
        for key in NUMBERS:
            assert x[key] == pytest.approx(y[key], rel=1e-4, abs=1e-6)


def test_rows_hold_the_protocol(spec, tmp_path):
    rows = sweep(spec, WANTED, tmp_path / "out.csv")
    assert len(rows) == 13
    with (tmp_path / "out.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 13
    needed = {"model", "text", "tokens", "window", "dtype", "prefill", "allocator", "arguments", "rule",
              "sparsity", "realised_sparsity", "perplexity", "kl", "versions", "plan_seconds"}  # fmt: skip
    assert needed <= set(table[0])
    assert json.loads(table[1]["versions"])["acttail"]
    assert table[0]["allocator"] == ""
    pyarrow = pytest.importorskip("pyarrow.parquet")
    again = sweep(spec, WANTED, tmp_path / "out.parquet")
    assert pyarrow.read_table(tmp_path / "out.parquet").num_rows == 13
    same(rows, again)


def test_a_damaged_cell_is_evaluated_again(spec, tmp_path):
    wanted = WANTED[:3]
    whole = sweep(spec, wanted, tmp_path / "out.csv")
    kept = sorted((tmp_path / "out.csv.cells").iterdir())
    kept[0].write_bytes(kept[0].read_bytes()[:50])
    kept[1].write_text("[]")
    left = temporary_file(kept[2])
    left.rename(left.with_name(left.name.replace(f"-{os.getpid()}-", "-999999999-")))
    same(whole, sweep(spec, wanted, tmp_path / "out.csv"))
    assert sorted((tmp_path / "out.csv.cells").iterdir()) == kept
    assert all(json.loads(file.read_text()) for file in kept)


def test_a_stopped_sweep_goes_on(spec, tmp_path, monkeypatch):
    whole = sweep(spec, WANTED, tmp_path / "whole.csv")
    real, ran = module.run_cell, []

    def failing(spec, cell, threads=None):
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append(cell)
        return real(spec, cell, threads=threads)

    monkeypatch.setattr(module, "run_cell", failing)
    with pytest.raises(KeyboardInterrupt):
        sweep(spec, WANTED, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    monkeypatch.setattr(
        module, "run_cell", lambda s, c, threads=None: ran.append(c) or real(s, c, threads=threads)
    )
    rows = sweep(spec, WANTED, tmp_path / "out.csv")
    assert len(ran) == 13
    same(whole, rows)


def test_a_cell_out_of_reach_is_there_and_says_why(spec, tmp_path):
    rows = sweep(spec, cells([0.95], ["uniform", "ffn-only"], ["default"]), tmp_path / "out.csv")
    assert rows[1]["perplexity"] > 0
    assert "at most" in rows[2]["unreachable"]
    with (tmp_path / "out.csv").open() as file:
        last = list(csv.DictReader(file))[2]
    assert last["allocator"] == "ffn-only"
    assert last["perplexity"] == ""


def test_bad_output(spec, tmp_path):
    with pytest.raises(ActTailError, match=r"\.csv or \.parquet"):
        sweep(spec, WANTED, tmp_path / "out.xlsx")


@pytest.mark.slow
def test_processes_agree_with_one(spec, tmp_path):
    same(
        sweep(spec, WANTED[:5], tmp_path / "a.csv"),
        sweep(spec, WANTED[:5], tmp_path / "b.csv", jobs=2),
    )


@pytest.mark.slow
def test_ray_agrees_with_one(spec, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    one = sweep(spec, WANTED[:4], tmp_path / "a.csv")
    same(one, sweep(spec, WANTED[:4], tmp_path / "b.csv", ray_address="local"))


@pytest.mark.slow
def test_kill_at_random_moments(spec, tmp_path):
    """kill -9 six times (scripts/kill.py: twenty): the resumed table equals the undisturbed one."""
    whole = sweep(spec, WANTED, tmp_path / "whole.csv")
    command = [
        sys.executable, "-m", "acttail", "sweep", spec.model, "--text", spec.text, "-o", str(tmp_path / "out.csv"),
        "--sparsity", "0.3,0.6", "--allocator", "uniform,sensitivity", "--rule", "topk,wina,threshold",
        "--calibration-text", spec.text, "--calibration-tokens", "64", "--tokens", "128", "--window", "64",
        "--dtype", "float32",
    ]  # fmt: skip
    rng = np.random.default_rng(1)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(6):
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(1.0, 6.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13
    for a, b in zip(whole, rows, strict=True):
        for key in NUMBERS:
            assert a[key] == pytest.approx(float(b[key]), rel=1e-4, abs=1e-6)
