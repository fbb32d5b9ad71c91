"""Converted models, kept: the second start of a model reads what the first one packed.

An entry is an .acttail folder in the cache, named by a digest of what it was made from: size, time, header and
sampled bytes of the model's files, the formats and the plan asked for, and the code that packed it. It is written
beside its place and renamed, so that two processes may do the same; beyond the limit, what was used longest ago goes.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Len

from acttail import _native
from acttail.base.controls import clean
from acttail.base.files import cache_dir, cache_lasts, cannot_write, write_json
from acttail.base.schema import STRICT, Count, SchemaError, checked, read_json
from acttail.base.temporaries import sweep, temporary_folder
from acttail.engine.config import EngineConfig
from acttail.engine.light_tokenizer import LightTokenizer, write_light
from acttail.engine.store import Packed, write_packed
from acttail.errors import ActTailError, ActTailWarning, reason
from acttail.model.hf import quiet_transformers
from acttail.model.names import ModelSource, is_packed
from acttail.plan import SparsityPlan

_ENDS = "generation.json"
LIMIT = "ACTTAIL_CACHE_LIMIT"
_DEFAULT_LIMIT = 20 * 10**9
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
# Of every file: its first bytes, which in a GGUF are the header, and samples over the rest.
_HEAD_BYTES, _SAMPLES, _SAMPLE_BYTES = 8 << 20, 64, 4096
# What may not be left of a disk.
_SPARE = 1 << 30


@dataclass(frozen=True)
class Entry:
    """A model that is kept.

    Attributes:
        folder: where.
        model: its name.
        dtype: default weight format of what is held.
        bytes: of the folder.
        used: when last, seconds since the epoch.
    """

    folder: Path
    model: str
    dtype: str
    bytes: int
    used: float


def limit() -> int:
    """Bytes that converted models may take; 0 for keeping none.

    Raises:
        ActTailError: ``ACTTAIL_CACHE_LIMIT`` is no size.
    """
    text = os.environ.get(LIMIT, "").strip()
    if not text:
        return _DEFAULT_LIMIT
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.lower())
    if found is None:
        raise ActTailError(
            f"{LIMIT} is a size such as 500MB or 20GB, or 0 for keeping nothing, not {text!r}"
        )
    return round(float(found[1]) * _UNITS[found[2]])


def place_of(source: ModelSource, config: EngineConfig, plan: SparsityPlan | None) -> Path | None:
    """Where a converted model is or would be kept; None if it is not.

    Args:
        source: of the model.
        config: that it is opened with.
        plan: that it is opened with. All that leave the output head dense, and none, share one entry: another
            order of fused projections gives the same numbers, and takes no longer to read.

    Raises:
        ActTailError: see :func:`limit`.
    """
    of_files = identity(source) if limit() and cache_lasts() else None
    if of_files is None:
        return None
    wanted = {
        "dtype": None if config.own_widths else config.dtype, "head": config.head.name, "group": config.group,
        "sparse head": plan is not None and plan.sparse_head is not None,
        "code": code(("engine", "model")), "files": of_files,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode())
    return _folder() / digest.hexdigest()[:32]


def identity(source: ModelSource) -> str | None:
    """Digest of the sizes, times, headers and samples of a model's files; None if it has none that are known."""
    digest = hashlib.sha256()
    try:
        files = source.files()
        for file in files:
            about = file.stat()
            digest.update(_sample(file, about.st_size, about.st_mtime_ns))
    except OSError:  # whoever reads the model says it better
        return None
    return digest.hexdigest() if files else None


def keep(place: Path, packed: Packed, tokenizer: object, eos: frozenset[int]) -> None:
    """Keep a converted model, whole or not at all; where that cannot be, a warning says why.

    Args:
        place: of :func:`place`.
        packed: the model.
        tokenizer: of transformers.
        eos: ids that end a sequence.
    """
    allowed = limit()
    if packed.bytes > allowed:
        return
    temporary: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place.parent)  # before the disk is asked what is free
        _make_room(allowed - packed.bytes)
        if shutil.disk_usage(place.parent).free < packed.bytes + _SPARE:
            warnings.warn(
                "the disk is too full to keep the converted weights", ActTailWarning, stacklevel=2
            )
            return
        temporary = temporary_folder(place)
        write_packed(temporary, packed)
        write_model_text(temporary, tokenizer, eos)
        if place.exists() and not is_packed(place):  # half removed
            shutil.rmtree(place, ignore_errors=True)
        temporary.rename(place)
    except (OSError, ActTailError) as error:
        if not is_packed(place):  # else another process was faster
            why = error.strerror if isinstance(error, OSError) else str(error)
            message = f"the converted weights are not kept in {place.parent}: {why}"
            warnings.warn(message, ActTailWarning, stacklevel=2)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_model_text(folder: Path, tokenizer: object, eos: frozenset[int]) -> None:
    """Write what an .acttail folder holds beside weights: the tokenizer, and what ends a sequence.

    Raises:
        ActTailError: something of it cannot be written.
    """
    try:
        if isinstance(tokenizer, LightTokenizer):
            tokenizer.save_pretrained(folder)
        else:
            with quiet_transformers():
                tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
            write_light(folder, tokenizer)
    except (ActTailError, OSError):
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise cannot_write(folder, reason(error)) from error
    write_json(folder / _ENDS, {"eos_token_id": sorted(eos)})


@dataclass(frozen=True)
class _Ends:
    """What generation.json holds; the annotations are its schema."""

    __pydantic_config__ = STRICT

    eos_token_id: Annotated[tuple[Count, ...], Len(0, 1 << 16)]


def read_ends(folder: Path) -> frozenset[int]:
    """The ids that end a sequence, of an .acttail folder.

    Raises:
        ActTailError: they cannot be read, or are none.
    """
    path = folder / _ENDS
    try:
        return frozenset(checked(_Ends, read_json(path, "a list of ends")).eos_token_id)
    except SchemaError as error:
        raise ActTailError(
            f"{path} is not a list of ends: {error}; convert the model again"
        ) from None


def discard(place: Path) -> None:
    """Remove an entry that cannot be read."""
    shutil.rmtree(place, ignore_errors=True)


def touch(place: Path) -> None:
    """Note that an entry was used."""
    try:
        os.utime(place)
    except OSError:  # a read-only cache is of use all the same
        return


def entries() -> list[Entry]:
    """What is kept, last used first."""
    return sorted(_entries(), key=lambda e: -e.used)


def clear(names: Sequence[str] = ()) -> list[Entry]:
    """Throw away entries.

    Args:
        names: of models or of entries' folders (or their beginnings); everything without any.

    Returns:
        What was thrown away.

    Raises:
        ActTailError: nothing is kept under one of the names, or it cannot be removed.
    """
    known = entries()
    gone = [] if names else known
    for name in names:
        found = [
            e
            for e in known
            if e.model == name or (len(name) >= 4 and e.folder.name.startswith(name))
        ]
        if not found:
            raise ActTailError(f"nothing is kept of {name}: acttail cache lists what is")
        gone += [e for e in found if e not in gone]
    for entry in gone:
        _remove(entry)
    return gone


def _folder() -> Path:
    return cache_dir() / "converted"


def _entries() -> Iterator[Entry]:
    try:
        folders = [f for f in _folder().iterdir() if is_packed(f) and not f.name.startswith(".")]
    except (OSError, ActTailError):
        return
    for folder in folders:
        try:
            about = read_json(folder / "engine.json", "an engine's description")
            size = sum(f.stat().st_size for f in folder.iterdir())
            names = clean(str(about["source"])), clean(str(about["dtype"]))
            yield Entry(folder, *names, size, folder.stat().st_mtime)
        except (OSError, ActTailError, KeyError, TypeError):  # going, or damaged
            continue


def _make_room(allowed: int) -> None:
    """Remove what was used longest ago until no more than `allowed` bytes are kept."""
    total = 0
    for entry in entries():
        total += entry.bytes
        if total > allowed:
            _remove(entry)


def _remove(entry: Entry) -> None:
    # Without its description a folder is no entry, so it goes first; who reads it already goes on.
    try:
        (entry.folder / "engine.json").unlink(missing_ok=True)
        shutil.rmtree(entry.folder, ignore_errors=True)
    except OSError as error:
        raise ActTailError(f"cannot remove {entry.folder}: {error.strerror}") from error


def _sample(file: Path, size: int, modified: int) -> bytes:
    digest = hashlib.sha256(f"{file.name} {size} {modified}\n".encode())
    with file.open("rb") as opened:
        digest.update(opened.read(_HEAD_BYTES))
        rest = size - _HEAD_BYTES
        for i in range(_SAMPLES if rest > 0 else 0):
            opened.seek(_HEAD_BYTES + rest * i // _SAMPLES)
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.digest()


def code(rooms: Sequence[str]) -> str:
    """What names the code of some rooms and of the native library: another release or build may differ."""
    package = Path(__file__).parents[1]
    files = [f for room in rooms for f in sorted((package / room).rglob("*.py"))]
    files += sorted(Path(_native.__file__).parent.iterdir())
    found = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(repr(found).encode()).hexdigest()
