"""A GGUF model: one file, or the parts of a split one, their headers read once; and the hash of its contents."""

import functools
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from acttail.errors import ModelError
from acttail.model.gguf_header import Header, read_header

# As llama.cpp's gguf-split names parts: the first holds everything but the other parts' tensors.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_MERGE = "or join them with llama.cpp's gguf-split --merge"


def open_gguf(path: Path) -> Header:
    """Open a GGUF model and check that every tensor lies within its file.

    Args:
        path: of the file, or of the first part of a split one; the last two opened are kept.

    Returns:
        Its header; of a split file the first part's, with the tensors of all.

    Raises:
        ModelError: not a GGUF file, truncated, or a part of it is missing or another's.
    """
    return _open_gguf(*(_version(part) for part in gguf_files(path)))


def gguf_files(path: Path) -> tuple[Path, ...]:
    """The files of a GGUF model, in order: the file itself, or all the parts of a split one.

    Raises:
        ModelError: a part is missing, or it is not the first that was named.
    """
    found = _PART.fullmatch(path.name)
    if found is None or int(found["count"]) < 2:
        return (path,)
    number, count = int(found["number"]), int(found["count"])
    parts = tuple(
        path.with_name(f"{found['stem']}-{i:05}-of-{count:05}{path.suffix}")
        for i in range(1, count + 1)
    )
    if number != 1:
        raise ModelError(f"{path.name} is part {number} of {count}; name the first: {parts[0]}")
    missing = [part for part in parts if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{path.name} is the first of {count} parts, and {missing[0]}{more} is missing; fetch all parts into "
            "one folder"
        )
    return parts


def content_hash(path: Path) -> str:
    """SHA-256 of a model's files one after the other, in hexadecimal digits."""
    return _content_hash(*(_version(part) for part in gguf_files(path)))


Version = tuple[Path, int, int]


def _version(path: Path) -> Version:
    """What names the contents of a file without reading them."""
    with _reading(path):
        about = path.stat()
    return path, about.st_size, about.st_mtime_ns


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error


@functools.lru_cache(maxsize=2)
def _open_gguf(*files: Version) -> Header:
    parts = [_read(path) for path, _, _ in files]
    first, count = parts[0], len(parts)
    if not isinstance(first.get("general.architecture"), str):
        raise ModelError(f"{first.path} does not say of which architecture it is; fetch it again")
    said = first.get("split.count", 0)
    if count == 1 and isinstance(said, int) and said > 1:
        raise ModelError(
            f"{first.path} is one of {said} parts by its header and not by its name: name them as they came "
            f"(…-00001-of-{said:05}.gguf), {_MERGE}"
        )
    if count == 1:
        return first
    tensors = {}
    for number, part in enumerate(parts):
        of = part.get("split.no"), part.get("split.count")
        if of != (number, count):
            raise ModelError(
                f"{part.path} says that it is part {of[0]} (from 0) of {of[1]}, not {number} of {count}: the parts "
                f"are not of one model; fetch them again, {_MERGE}"
            )
        for tensor in part.tensors:
            if tensor.name in tensors:
                raise ModelError(
                    f"{part.path} has {tensor.name}, which another part has, too; fetch them again"
                )
            tensors[tensor.name] = tensor
    total = first.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise ModelError(
            f"the {count} parts of {first.path} hold {len(tensors)} tensors, not {total}: they are not of one "
            "model; fetch them again"
        )
    return Header(first.path, first.fields, tuple(tensors.values()))


def _read(path: Path) -> Header:
    with _reading(path):
        return read_header(path)


@functools.lru_cache(maxsize=16)
def _content_hash(*files: Version) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with _reading(path), path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
