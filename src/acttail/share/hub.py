"""Sparse models in Hugging Face's form: a folder with the plan inside and a card, and the Hub."""

import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acttail._version import __version__
from acttail.adapt.provenance import ADAPTED
from acttail.base.files import write_text
from acttail.base.folders import replacing_folder
from acttail.errors import ActTailError, ModelError, reason
from acttail.model.hf import TOKENIZER_FILES
from acttail.model.relu import rectified_norms
from acttail.plan import SparsityPlan
from acttail.report.heatmap import grid, terminal
from acttail.sparse.state import sparse_state

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- acttail
- activation-sparsity
{metadata}---

# {title}

{base} with *activation sparsity*: {what}
{weights}

## Use

```python
import acttail  # registers the plan with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repository}")
tokenizer = AutoTokenizer.from_pretrained("{repository}")
```

Without `import acttail` {alone}. To decode faster, with native
kernels:

```
acttail generate {repository} --prompt "The sky is blue because"
acttail serve {repository}
```

## The plan

| | |
|---|---|
| allocator | `{allocator}` ({arguments}) |
| which entries stay | `{rule}` |
| sparsity asked | {sparsity:g} |
| sparsity after rounding to whole entries | {realised:.4f} |
| prompts | policy `{prefill}` |
| made with | {versions} |

| projection | mean sparsity | lowest | highest |
|---|---|---|---|
{kinds}

```
{heat}
```

## Quality

{results}

## Limits

Dropping inputs changes what the model says, the more the sparser it is; measure it on your own text
(`acttail eval`) before you rely on it. What holds for the base model, its licence and its biases included,
holds for this one.
"""


_LARGEST = """at every linear projection only the largest entries of the input
vector are kept, and only the weights they meet need to be read."""
_ZEROS = """its activations are ReLU's, and the weights that an exact zero meets need
not be read; nothing else is dropped."""
_DENSE = "transformers loads the dense model, with a warning"
_ALIKE = "transformers loads the same model, with a warning, and reads all of it"
_REFUSED = "transformers refuses it, for it cannot put ReLU after the norms"
_SAME = """The weights are those of the base model,
bit for bit; what was added is a plan, in `config.json`, that says how much each projection drops."""
_RELU = """The activations were swapped and the weights adapted to it by a
short distillation of the dense model into this one ({note}); it is another model than {base}, and further from it
the shorter that was."""
_CHANGED = """A plan, in `config.json`, says how much each
projection drops. The weights were adapted to it by a short distillation of the dense model into itself made
sparse ({note})."""


def model_card(
    plan: SparsityPlan, *, repository: str, base: str | None = None, prefill: str = "all",
    results: Sequence[Mapping[str, Any]] = (), license_: str | None = None, refused: bool = False,
) -> str:  # fmt: skip
    """The README of a sparse model.

    Args:
        plan: that the model runs under.
        repository: where the model is to be found.
        base: the dense model's name; the plan's by default.
        prefill: the prefill policy.
        results: rows of `compare`, `eval` or `sweep`.
        license_: of the base model, as the Hub names it.
        refused: whether transformers cannot build the model without acttail.
    """
    base = base or plan.model
    note = plan.created_with.get(ADAPTED)
    relation = "quantized" if note is None else "finetune"
    metadata = "" if "(" in base else f"base_model: {base}\nbase_model_relation: {relation}\n"
    if license_:
        metadata += f"license: {license_}\n"
    kinds: dict[str, list[float]] = defaultdict(list)
    for entry in plan.projections.values():
        kinds[entry.kind].append(entry.realised_sparsity)
    cells = [(e.kind, e.block, e.realised_sparsity) for e in plan.projections.values()]
    return _CARD.format(
        metadata=metadata, title=repository.rpartition("/")[2], base=base, repository=repository,
        allocator=plan.allocator,
        arguments=", ".join(f"{k}={v}" for k, v in plan.arguments.items() if k != "curves") or "no arguments",
        rule=plan.rule, sparsity=plan.sparsity, realised=plan.realised_sparsity, prefill=prefill,
        versions=", ".join(f"{k} {v}" for k, v in plan.created_with.items() if k != ADAPTED) or f"acttail {__version__}",
        kinds="\n".join(
            f"| {k} | {sum(v) / len(v):.3f} | {min(v):.3f} | {max(v):.3f} |" for k, v in kinds.items()
        ),
        weights=_SAME if note is None else (_RELU if plan.exact else _CHANGED).format(note=note, base=base),
        what=_ZEROS if plan.exact else _LARGEST,
        alone=_REFUSED if refused else _ALIKE if plan.exact else _DENSE,
        heat=terminal(grid(cells), title="sparsity"), results=_results(results),
    )  # fmt: skip


def _results(rows: Sequence[Mapping[str, Any]]) -> str:
    scored = [r for r in rows if r.get("perplexity") is not None]
    if not scored:
        return "Not measured. `acttail eval` measures perplexity, KL to the dense model and tasks."
    lines = [
        "| model | sparsity | text | perplexity | KL to dense | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for row in scored:
        error = row.get("perplexity_stderr")
        shown = f"{row['perplexity']:.2f}" + (f" ± {error:.2f}" if error is not None else "")
        kl, top1 = row.get("kl"), row.get("top1")
        lines.append(
            f"| {row.get('allocator') or 'dense'} | {row['realised_sparsity']:.4f} | {row.get('text', '')} | {shown} "
            f"| {'' if kl is None else f'{kl:.4f}'} | {'' if top1 is None else f'{top1:.3f}'} |"
        )
    return "\n".join(lines)


# What a save writes, and what an earlier one, sharded say, may have left.
_OWNED = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "config.json", "generation_config.json", "README.md",
    *TOKENIZER_FILES,
)  # fmt: skip


def save(
    model: Any, tokenizer: Any, folder: str | os.PathLike[str], *, repository: str | None = None,
    results: Sequence[Mapping[str, Any]] = (), license_: str | None = None,
) -> None:  # fmt: skip
    """Write a sparse model as a folder of transformers, with its plan and a card.

    Args:
        model: sparse, see :func:`acttail.sparsify_`.
        tokenizer: of the model, or None.
        folder: created if it is not there; must be empty or hold a model to be replaced.
        repository: name in the card; the folder's by default.
        results: see :func:`model_card`.
        license_: see :func:`model_card`.

    Raises:
        ModelError: the model is dense.
        ActTailError: the folder cannot be written.
    """
    state = sparse_state(model)
    if state is None:
        raise ModelError("the model is dense: sparsify_ it first, or save it with save_pretrained")
    target = Path(folder)
    name = repository or target.resolve().name
    card = model_card(
        state.plan, repository=name, base=_base(model), prefill=str(state.policy), results=results,
        license_=license_, refused=bool(rectified_norms(model.config)),
    )  # fmt: skip
    with replacing_folder(target, _OWNED) as written:
        try:
            model.save_pretrained(written)
            if tokenizer is not None:
                tokenizer.save_pretrained(written)
        except OSError:
            raise
        except Exception as error:  # of safetensors and tokenizers, which name what failed
            raise ActTailError(f"cannot write {target}: {reason(error)}") from error
        write_text(written / "README.md", card)


def _base(model: Any) -> str | None:
    """A name on the Hub, if the model came from there."""
    source = getattr(model, "acttail_source", None)
    name = getattr(model.config, "name_or_path", "") or ""
    if source is not None and source.gguf is not None:
        return None
    return name if name.count("/") == 1 and not Path(name).exists() else None


def push(
    model: Any, tokenizer: Any, repository: str, *, private: bool = False,
    results: Sequence[Mapping[str, Any]] = (), license_: str | None = None,
) -> str:  # fmt: skip
    """Push a sparse model, its plan and its card to the Hub.

    Args:
        model: sparse.
        tokenizer: of the model, or None.
        repository: NAME or USER/NAME; created if it is not there.
        private: whether a new repository is.
        results: see :func:`model_card`.
        license_: see :func:`model_card`.

    Returns:
        The repository's address.

    Raises:
        ModelError: the model is dense.
        ActTailError: the Hub refused, or was not reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="acttail-push-") as folder:
        save(model, tokenizer, folder, repository=repository, results=results, license_=license_)
        try:
            created = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=created.repo_id, folder_path=folder,
                commit_message=f"Sparse model of acttail {__version__}",
            )  # fmt: skip
        except Exception as error:
            raise ActTailError(
                f"cannot push to {repository}: {reason(error)} (`hf auth login` gives access)"
            ) from error
    return str(created)
