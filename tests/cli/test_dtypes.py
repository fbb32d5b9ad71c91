"""--dtype: both spellings in every command that takes one, and bad ones judged before anything is read."""

import json

import pytest
from byte_tokens import byte_tokenizer
from families import build

from acttail.sparse.backends import cpu

native = pytest.mark.skipif(not cpu.status().available, reason="no native library")


SPELLINGS = ("float32", "fp32")


def test_commands_of_transformers_take_both_spellings(run, tiny_folder, text_file, tmp_path):
    scoring = ("--text", text_file, "--window", 64, "--tokens", 192, "--json")
    for name in SPELLINGS:
        plan = tmp_path / f"{name}.json"
        code, _, err = run("plan", tiny_folder, "--sparsity", 0.5, "-o", plan, "--dtype", name)
        assert code == 0, err
        code, out, err = run("eval", tiny_folder, "--dtype", name, *scoring)
        assert code == 0, err
        assert json.loads(out)["dtype"] == "float32"
        code, out, err = run(
            "compare",
            tiny_folder,
            "--sparsity",
            0.5,
            "--allocator",
            "uniform",
            "--dtype",
            name,
            *scoring,
        )
        assert code == 0, err


def test_a_sweep_finds_its_cells_under_either_spelling(run, tiny_folder, text_file, tmp_path):
    table = tmp_path / "sweep.csv"
    seconds = []
    for name in SPELLINGS:
        code, out, err = run(
            "sweep", tiny_folder, "--text", text_file, "--window", 64, "--tokens", 192, "-o", table,
            "--sparsity", 0.5, "--allocator", "uniform", "--dtype", name, "--json",
        )  # fmt: skip
        assert code == 0, err
        seconds.append([row["seconds"] for row in json.loads(out)])
    assert seconds[0] == seconds[1]  # the second run measured nothing


@native
def test_commands_of_the_engine_take_both_spellings(run, tiny_folder, tmp_path):
    for name in SPELLINGS:
        code, out, err = run(
            "convert",
            tiny_folder,
            "--dtype",
            name,
            "--head-dtype",
            name,
            "-o",
            tmp_path / name,
            "--json",
        )
        assert code == 0, err
        assert json.loads(out)["dtype"] == "fp32"
        for engine in ("native", "transformers"):
            code, out, err = run(
                "generate", tiny_folder, "--prompt", "abc", "--max-new-tokens", 2, "--dtype", name,
                "--engine", engine, "--json",
            )  # fmt: skip
            assert code == 0, err
            assert json.loads(out)["dtype"] == ("fp32" if engine == "native" else "float32")
        code, out, err = run(
            "bench", tiny_folder, "--dtype", name, "--rounds", 1, "--new-tokens", 2, "--prompt-tokens", 9,
            "--json",
        )  # fmt: skip
        assert code == 0, err
        assert json.loads(out)["dtype"] == "fp32"


@pytest.mark.parametrize(
    "command",
    [
        ("plan", "MODEL", "-o", "x.json"), ("eval", "MODEL", "--text", "x"),
        ("compare", "MODEL", "--text", "x"), ("sweep", "MODEL", "--text", "x", "-o", "x.csv"),
        ("generate", "MODEL", "--prompt", "x"), ("serve", "MODEL"), ("bench", "MODEL"),
        ("convert", "MODEL", "-o", "x"), ("tune", "MODEL"),
    ],
)  # fmt: skip
def test_an_unknown_dtype_is_refused_before_the_model_is_looked_for(run, command):
    code, out, err = run(*command, "--dtype", "fp8")
    assert code == 2
    assert "dtype 'fp8': use " in err
    assert len(err.strip().splitlines()) == 1
    assert not out


@native
def test_what_a_folder_holds_is_run_unless_something_else_is_asked_for(run, tiny_folder, tmp_path):
    folder = tmp_path / "packed"
    assert run("convert", tiny_folder, "--dtype", "int8", "-o", folder, "--json")[0] == 0
    generate = ("generate", folder, "--prompt", "abc", "--max-new-tokens", 2, "--json")
    code, out, err = run(*generate)
    assert code == 0, err
    assert json.loads(out)["dtype"] == "int8"
    code, out, err = run(*generate, "--dtype", "bf16")
    assert code == 2
    assert "leave out dtype=bf16" in err
    assert len(err.strip().splitlines()) == 1


def test_a_width_that_only_the_native_engine_has_is_refused_where_it_does_not_reach(run, tmp_path):
    build("neox").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    generate = ("generate", tmp_path, "--prompt", "abc", "--max-new-tokens", 2, "--json")
    code, out, err = run(*generate, "--dtype", "int8")
    assert code == 2
    assert "leave out dtype=int8" in err
    assert not out
    code, out, err = run(*generate)
    assert code == 0, err
    assert json.loads(out)["dtype"] == "bfloat16"
    assert "transformers runs it instead, in bfloat16" in " ".join(err.split())
