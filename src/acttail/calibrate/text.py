"""Find the text a user names and turn it into windows of tokens.

A text is a file, a folder of .txt and .md files, a dataset of the Hugging Face Hub, or one of the
names that every Python installation can serve: ``python-docs:calibration``, ``python-docs:score``.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acttail.base.files import expanded
from acttail.errors import TextError
from acttail.model.tokenizing import asking

# Topics of CPython's own help are dealt out by the hash of their name: two in five calibrate.
_PYTHON_DOCS = ("python-docs:calibration", "python-docs:score", "python-docs")


@dataclass(frozen=True)
class Text:
    """A text and where it came from.

    Attributes:
        name: what results record: the name given, with a hash of the content for a file.
        content: the whole text.
    """

    name: str
    content: str


def _python_docs(name: str) -> str:
    """English documentation that ships inside every CPython, split by topic so halves never meet."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextError("this Python ships no pydoc topics; give a text file instead") from error
    part = name.partition(":")[2]

    def calibrates(topic: str) -> bool:
        return hashlib.sha256(topic.encode()).digest()[0] % 5 < 2

    halves: dict[bool, list[str]] = {True: [], False: []}
    for topic, body in sorted(topics.items()):
        halves[calibrates(topic)] += [p.strip("\n") for p in re.split(r"\n{2,}", body) if p.strip()]
    if not part:
        return "\n\n".join(halves[True] + halves[False])
    if part == "score":
        return "\n\n".join(halves[False])
    # Some topics quote each other: what is scored is taken out of the calibration half.
    scored = set(halves[False])
    return "\n\n".join(p for p in halves[True] if p not in scored)


def _folder(path: Path) -> str:
    files = sorted(
        p for p in path.rglob("*") if p.suffix.lower() in (".txt", ".md") and p.is_file()
    )
    if not files:
        raise TextError(f"the folder {path} holds no .txt or .md file")
    return "\n\n".join(_file(p) for p in files)


def _file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte-order mark is not text
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error


def _dataset(name: str) -> str:
    """`hf:PATH[/CONFIG][:SPLIT[:COLUMN]]`, for example `hf:Salesforce/wikitext/wikitext-2-raw-v1:test`."""
    try:
        import datasets
    except ImportError as error:
        raise TextError("Hub datasets need the extra: pip install 'acttail[datasets]'") from error
    place, *rest = name.removeprefix("hf:").split(":")
    split = rest[0] if rest else "test"
    column = rest[1] if len(rest) > 1 else "text"
    parts = place.split("/")
    local = Path(place).exists()
    path, config = (
        (place, None) if local or len(parts) < 3 else ("/".join(parts[:2]), "/".join(parts[2:]))
    )
    try:
        rows: Any = datasets.load_dataset(path, config, split=split)
    except Exception as error:
        from acttail.errors import reason

        raise TextError(
            f"cannot load the dataset {place}, split {split}: {reason(error)}"
        ) from error
    if column not in rows.column_names:
        raise TextError(
            f"the dataset {place} has no column {column!r}; it has {', '.join(rows.column_names)}"
        )
    return "\n\n".join(str(value) for value in rows[column] if value)


def read_text(name: str | os.PathLike[str]) -> Text:
    """Read the text a user names.

    Args:
        name: a file, a folder, ``python-docs:calibration``, ``python-docs:score``, or a Hub dataset
            as ``hf:PATH[/CONFIG][:SPLIT[:COLUMN]]``.

    Raises:
        TextError: it does not exist, is not UTF-8, or is empty.
    """
    label = os.fspath(name)
    path = expanded(label)
    if label in _PYTHON_DOCS:
        content = _python_docs(label)
    elif label.startswith("hf:"):
        content = _dataset(label)
    elif path.is_dir():
        content = _folder(path)
    elif path.exists():
        content = _file(path)
    else:
        raise TextError(
            f"no text {label!r}: give a file, a folder, {_PYTHON_DOCS[0]}, {_PYTHON_DOCS[1]} or hf:DATASET"
        )
    if not content.strip():
        raise TextError(f"the text {label} is empty")
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    shown = label if label in _PYTHON_DOCS or label.startswith("hf:") else path.resolve().name
    return Text(f"{shown}@{digest}", content)


def tokenize(text: Text, tokenizer: Any) -> torch.Tensor:
    """The whole text as one string of token ids, [n] int64, without special tokens.

    A window gets a BOS of its own where the tokenizer adds one; see :func:`windows`.

    Raises:
        ActTailError: there is no tokenizer, or it fails.
    """
    with asking(tokenizer):
        ids = tokenizer(
            text.content, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
    return torch.tensor(ids["input_ids"], dtype=torch.int64)


def bos_of(tokenizer: Any) -> int | None:
    """The token that the tokenizer itself puts before a text, None if it adds none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return None
    with asking(tokenizer):
        ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return int(bos) if ids and ids[0] == bos else None


def check_window(window: int, tokens: int | None, stride: int | None) -> None:
    """Refuse numbers of tokens that make no windows of any text.

    Args:
        window: tokens per window.
        tokens: of the text to use; None for all.
        stride: tokens from one window's start to the next; None for no overlap.

    Raises:
        TextError: names the number.
    """
    if window < 2:
        raise TextError(f"a window needs at least 2 tokens, got {window}")
    if stride is not None and not 1 <= stride <= window:
        raise TextError(f"the stride must be from 1 to the window's {window} tokens, got {stride}")
    if tokens is not None and tokens < window:
        raise TextError(
            f"{tokens} tokens are fewer than one window of {window}; raise --tokens or lower --window"
        )


def windows(
    ids: torch.Tensor,
    window: int,
    tokens: int | None,
    stride: int | None,
    bos: int | None,
    name: str,
) -> torch.Tensor:
    """Cut a token string into windows of equal length.

    Windows do not overlap unless `stride` is smaller than `window`; what does not fill a window at
    the end is dropped. Where the tokenizer adds a BOS, each window starts with it.

    Args:
        ids: [n] token ids.
        window: tokens per window, the BOS included.
        tokens: use only this many ids from the start (rounded down to whole windows); None for all.
        stride: ids from one window's start to the next; None for no overlap.
        bos: the token to start each window with, or None.
        name: the text's name, for errors.

    Returns:
        [windows, window] int64.

    Raises:
        TextError: the text is shorter than one window, or the numbers make no sense.
    """
    check_window(window, tokens, stride)
    body = window - (bos is not None)
    step = body if stride is None else stride
    if not 1 <= step <= body:
        raise TextError(f"the stride must be from 1 to the window's {body} tokens, got {stride}")
    if tokens is not None:
        # Counted in window tokens, BOS included, so that 16,384 tokens are 16 windows of 1,024.
        ids = ids[: (tokens // window) * body if stride is None else tokens]
    if ids.numel() < body:
        raise TextError(
            f"the text {name} has {ids.numel()} tokens, fewer than one window of {window}; "
            "give a longer text or a smaller --window"
        )
    cut = ids.unfold(0, body, step)  # [windows, body]
    if bos is None:
        return cut.contiguous()
    return torch.cat([torch.full((cut.shape[0], 1), bos, dtype=cut.dtype), cut], dim=1)
