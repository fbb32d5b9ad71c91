"""The formats that acttail reads: small valid files of each, and what a user does with such a file."""

import csv
import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import acttail
from acttail.allocate.given import plan_from_sparsities, read_sparsities
from acttail.calibrate.curves import SensitivityCurves
from acttail.calibrate.text import Text
from acttail.engine import Engine
from acttail.engine.source import convert_model
from acttail.evaluate.perplexity import perplexity
from acttail.model.opened import as_weights, open_model
from acttail.model.projections import HEAD
from acttail.plan import SparsityPlan
from acttail.report import Report, render
from acttail.report.gather import add_results
from acttail.share.export import FORMATS as EXPORTS
from acttail.sparse.rules import kind_of

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from byte_tokens import byte_tokenizer
from gguf_files import blocky, write_gguf

_PROMPT = torch.tensor([60, 61, 62])
_ROW = {
    "model": "m", "allocator": "uniform", "rule": "topk", "sparsity": 0.5, "realised_sparsity": 0.5, "perplexity": 10.0,
    "perplexity_stderr": 0.5, "kl": 0.1, "kl_stderr": 0.01, "top1": 0.9, "top1_stderr": 0.01, "text": "t", "window": 64,
    "scored": 63, "windows": 1, "stride": 64, "bos": False, "dtype": "float32", "prefill": "all", "ratio_to_uniform": 1.0,
}  # fmt: skip
_SPEED = {
    "model": "m", "dtype": "bf16", "threads": 2, "sparsity": 0.5, "rounds": 7, "prompt_tokens": 128, "new_tokens": 64,
    "tokens_per_second": {"sparse": 20.0, "dense": 10.0}, "ratios": {"dense": {"median": 2.0, "low": 1.9, "high": 2.1}},
    "bytes_per_token": {"sparse": 1e6, "dense": 2e6}, "bandwidth_share": {"sparse": 0.5, "dense": 0.6},
}  # fmt: skip
_TASKS = {"sparsity": 0.5, "tasks": {"piqa": {"metrics": {"acc": {"value": 0.5, "stderr": 0.1}}}}}


class Models:
    """The tiny model that everything is tried on, as a folder, a GGUF file and in packed form."""

    def __init__(self, place: Path) -> None:
        self.model = model = blocky()
        self.tokenizer = byte_tokenizer()
        self.place, self.folder = place, place / "tiny"
        model.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)
        self.sharded = place / "sharded"
        model.save_pretrained(self.sharded, max_shard_size="100KB")
        self.tokenizer.save_pretrained(self.sharded)
        self.ggufs = []
        for kind in ("F32", "Q4_0", "Q8_0"):
            self.ggufs.append(place / f"{kind}.gguf")
            write_gguf(self.ggufs[-1], model, kind, self.tokenizer)
        self.plan = acttail.make_plan(str(self.folder), 0.5, allocator="uniform", head=True)
        self.packed = []
        for dtype in ("fp32", "int8", "int4"):
            self.packed.append(place / f"{dtype}.acttail")
            inside = self.plan if dtype == "int8" else None
            convert_model(self.folder, self.packed[-1], dtype=dtype, plan=inside)
        self.weights = as_weights(str(self.folder))
        self.engine = Engine.from_pretrained(self.folder, threads=1)


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        write: makes valid samples, files or folders, in a folder.
        use: does with one of them what a user does; the generator chooses between several things.
    """

    write: Callable[[Models, Path], list[Path]]
    use: Callable[[Models, Path, random.Random], object]


def _write_plans(models: Models, place: Path) -> list[Path]:
    data_free = acttail.make_plan(str(models.folder), 0.5)
    samples = {"uniform": models.plan, "acttail": data_free}
    return _saved(samples, place)


def _write_thresholds(models: Models, place: Path) -> list[Path]:
    def under(rule: str, **fields: float) -> SparsityPlan:
        blocks = {n: e for n, e in models.plan.projections.items() if e.kind != HEAD}
        entries = {n: replace(e, **fields) for n, e in blocks.items()}
        return replace(models.plan, rule=rule, projections=entries)

    samples = {
        "threshold": under("threshold", threshold=0.1), "cats": under("cats", threshold=0.05),
        "top-p": under("top-p", p=0.9),
    }  # fmt: skip
    sparsities = place / "sparsities.json"
    sparsities.write_text(json.dumps({p.name: 0.5 for p in models.weights.projections}))
    return [*_saved(samples, place), sparsities]


def _saved(samples: dict[str, SparsityPlan], place: Path) -> list[Path]:
    for name, plan in samples.items():
        plan.save(place / f"{name}.json")
    return [place / f"{name}.json" for name in samples]


def _use_plan(models: Models, path: Path, rng: random.Random) -> None:
    if path.stem == "sparsities":
        plan = plan_from_sparsities(models.weights, read_sparsities(path), name=path.name)
    else:
        plan = SparsityPlan.load(path)
    match rng.randrange(4):
        case 0 if kind_of(plan).native is not None:
            models.engine.with_plan(plan).generate(_PROMPT, max_new_tokens=2)
        case 0 | 3:
            model = acttail.sparsify_(models.model, plan)
            try:
                model(_PROMPT[None])
            finally:
                acttail.densify_(model)
        case 1:
            report = Report("tiny", plans=[("plan", plan)])
            plan.check(models.weights)
            render(report)
        case 2:
            # TEAL's form has no place for a head.
            forms = [n for n in EXPORTS if n != "teal" or plan.head is None]
            EXPORTS[rng.choice(forms)](plan, path.parent)
            plan.save(path)


def _write_curves(models: Models, place: Path) -> list[Path]:
    grid = np.linspace(0, 0.9, 10)
    names = [p.name for p in models.weights.projections]
    curves = {name: (i + 1) * 0.01 * grid**2 for i, name in enumerate(names)}
    about = {"model": "tiny", "text": "t", "tokens": "64", "window": "64", "loss": "fisher"}
    SensitivityCurves(grid, curves, about).save(place / "curves.safetensors")
    return [place / "curves.safetensors"]


def _use_curves(models: Models, path: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        render(Report("tiny", curves=SensitivityCurves.load(path)))
        return
    arguments, sparsity = {"curves": str(path)}, rng.choice((0.1, 0.5, 0.8))
    acttail.make_plan(str(models.folder), sparsity, allocator="sensitivity", arguments=arguments)


def _write_results(models: Models, place: Path) -> list[Path]:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [_ROW, _ROW | {"sparsity": 0.7}]
    files = {"rows.json": rows, "speed.json": _SPEED, "tasks.json": [_TASKS]}
    for name, data in files.items():
        (place / name).write_text(json.dumps(data))
    with (place / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, _ROW)
        writer.writeheader()
        writer.writerows([_ROW, _ROW])
    parquet.write_table(pa.Table.from_pylist([_ROW]), place / "rows.parquet")
    return [place / name for name in (*files, "rows.csv", "rows.parquet")]


def _use_results(models: Models, path: Path, rng: random.Random) -> None:
    report = Report("tiny", plans=[("plan", models.plan)])
    add_results(report, str(path))
    render(report)


def _use_model(models: Models, path: Path, rng: random.Random) -> None:
    match rng.randrange(5):
        case 0 | 1 | 2:
            engine = Engine.from_pretrained(path, threads=1)
            engine.generate("ab" if engine.tokenizer is not None else _PROMPT, max_new_tokens=2)
        case 3:
            weights = as_weights(path)
            acttail.make_plan(weights, 0.5, allocator="uniform")
            weights.tensor(weights.projections[0].parameter_name)
        case 4:
            model, tokenizer = open_model(path).load()
            perplexity(model, tokenizer, Text("t", "abcdefghij" * 4), window=16)


FORMATS: dict[str, Format] = {
    "plan": Format(_write_plans, _use_plan),
    "thresholds": Format(_write_thresholds, _use_plan),
    "curves": Format(_write_curves, _use_curves),
    "results": Format(_write_results, _use_results),
    "gguf": Format(lambda models, place: models.ggufs, _use_model),
    "safetensors": Format(lambda models, place: [models.folder, models.sharded], _use_model),
    "acttail": Format(lambda models, place: models.packed, _use_model),
}  # fmt: skip


def copied(sample: Path, place: Path) -> Path:
    """A copy of a sample that may be damaged."""
    target = place / sample.name
    if sample.is_dir():
        shutil.copytree(sample, target)
    else:
        shutil.copyfile(sample, target)
    return target
