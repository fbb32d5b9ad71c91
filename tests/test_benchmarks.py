"""The benchmarks run for anybody: on text that every Python ships, into any folder, saying what they measured on."""

import csv
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
HELPERS = {"common", "decoding", "gpu", "random_gguf", "timing"}
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in HELPERS)


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("common")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=FOLDER
    )  # fmt: skip


def test_every_script_says_its_options():
    """In one process, for each would import torch again."""
    code = (
        "import runpy, sys\n"
        "names, sys.argv[1:] = sys.argv[1:], ['--help']\n"
        "for name in names:\n"
        "    try:\n"
        "        runpy.run_path(name + '.py', run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        print('ended', name, end.code)\n"
    )
    done = run(code, *SCRIPTS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [x for x in done.stdout.splitlines() if x.startswith("ended")] == [
        f"ended {name} 0" for name in SCRIPTS
    ]
    assert done.stdout.count("--out FOLDER") >= len(SCRIPTS)


def test_each_claim_has_one_script_and_one_csv():
    # scaling.py checks its fit on whole models, which are rows of another kind.
    claims = {p.stem for p in FOLDER.glob("*.csv")} - {"scaling_models"}
    assert claims <= set(SCRIPTS)
    assert set(SCRIPTS) - claims <= {
        "gpu_decode",
        "gpu_kernels",
        "forecast",
    }  # not measured yet


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.csv")), ids=lambda p: p.stem)
def test_each_row_says_on_what_it_was_measured(path):
    rows = read(path)
    assert rows
    for column in ("model", "text", "calibration", "cpu", "threads", "date", "acttail", "torch", "transformers"):  # fmt: skip
        assert all(r[column] for r in rows), column


def test_a_file_with_other_columns_is_refused(common, tmp_path):
    rows = common.Rows("claim", tmp_path)
    rows.append({"seconds": 1}, common.On("m"))
    rows.append({"seconds": 2}, common.On("m", "t"))
    before = rows.path.read_text()
    with pytest.raises(SystemExit, match="lacks rounds; has besides seconds") as refused:
        rows.append({"rounds": 3}, common.On("m"))
    assert "\n" not in str(refused.value)
    assert rows.path.read_text() == before
    assert [(r["seconds"], r["model"], r["text"]) for r in read(rows.path)] == [
        ("1", "m", "none"), ("2", "m", "t"),
    ]  # fmt: skip


def test_what_was_measured_on_something_else_is_neither_done_nor_in_the_table(common, tmp_path):
    rows = common.Rows("claim", tmp_path)
    for model, text, value in (("a", "x", 1), ("a", "y", 2), ("a", "y", 3), ("b", "y", 4)):
        rows.append({"what": value > 2, "value": value}, common.On(model, text))
    assert rows.done(common.On("a", "y"), "value") == {("2",), ("3",)}
    assert rows.done(common.On("a", "z"), "value") == set()
    assert [r["value"] for r in rows.latest("what").values()] == ["4"]
    assert [r["value"] for r in rows.latest("what", model="a").values()] == ["2", "3"]


def test_another_folder_leaves_the_pages_alone(common, tmp_path, capsys):
    page = FOLDER.parent / "docs" / "performance.md"
    before = page.read_bytes()
    common.fill(tmp_path, "docs/performance.md", "decode", "a table")
    assert page.read_bytes() == before
    assert "a table" in capsys.readouterr().out


def test_there_is_one_fill():
    said = [p.stem for p in FOLDER.glob("*.py") if ": begin -->" in p.read_text(encoding="utf-8")]
    assert said == ["common"]


def test_without_shared_the_texts_are_those_of_python(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTTAIL_SHARED", str(tmp_path))
    done = run("import common; print(common.SCORED, common.CALIBRATION)")
    assert done.stdout.split() == ["python-docs:score", "python-docs:calibration"]


def test_scripts_run_on_any_model(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACTTAIL_SHARED", str(tmp_path / "nothing"))
    arguments = {
        "native_linear": ["--rounds", 1, "--tokens", 4],
        "engine_quality": ["--tokens", 64, "--window", 32, "--widths", "bf16", "--calibration-tokens", 256],
    }  # fmt: skip
    for name, extra in arguments.items():
        call = [FOLDER / f"{name}.py", "--model", tiny_folder, "--out", tmp_path, *extra]
        done = subprocess.run(
            [sys.executable, *map(str, call)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{name}\n{done.stderr[-2000:]}"
        rows = read(tmp_path / f"{name}.csv")
        assert {r["model"] for r in rows} == {"tiny-llama"}
    assert {r["text"].partition("@")[0] for r in read(tmp_path / "engine_quality.csv")} == {
        "python-docs:score"
    }
