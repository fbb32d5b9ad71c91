"""Reading JSON by a schema: dataclasses say what may be there, and whatever else is refused in one line.

A dataclass' annotations are the format's schema, the one place that knows it. pydantic reads them; it is
imported when the first file is (30 ms).
"""

import functools
import json
import math
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from annotated_types import Ge, Le, Len, Predicate

from acttail.base.controls import clean
from acttail.errors import ActTailError

T = TypeVar("T")

# A dataclass of a format has `__pydantic_config__ = STRICT`: no key that is not known, no text for a number, no NaN.
STRICT: Any = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
# For what others write, or what grows: as strict of what is read, and the rest is let be.
OPEN: Any = STRICT | {"extra": "ignore"}

# No file of ours is deeper; a deep one would exhaust the stack of whatever walks over it.
_DEEPEST = 32
_LARGEST = 1 << 30
_LONGEST_NAME = 1024


def _printable(text: str) -> bool:
    return clean(text) == text and not set(text) & {"\n", "\t"}


# What a format's fields are made of.
Name = Annotated[str, Len(1, _LONGEST_NAME), Predicate(_printable)]
Share = Annotated[float, Ge(0), Le(1)]
NotNegative = Annotated[float, Ge(0)]
# Features, rows and columns: what fits the products of two that native code forms.
Size = Annotated[int, Ge(1), Le(1 << 30)]
Count = Annotated[int, Ge(0), Le(1 << 40)]


class SchemaError(Exception):
    """Data is not of its schema; the message names the field, not the file."""


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def checked(kind: type[T], data: Any) -> T:
    """A value of a schema, from plain JSON data.

    Args:
        kind: a dataclass, or any type that pydantic knows.
        data: what a JSON file held.

    Raises:
        SchemaError: it is not of this kind; names the first field that is wrong.
    """
    from pydantic import ValidationError

    _walk(data, _DEEPEST)
    try:
        # As text: only there is a list as good as a tuple, and an object as a dataclass, to strict types.
        found: T = _adapter(cast("Hashable", kind)).validate_json(
            json.dumps(data, allow_nan=False), strict=True
        )
    except ValidationError as error:
        raise SchemaError(_first(error)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"it is not plain JSON data ({error})") from None
    return found


def parse(text: str | bytes) -> Any:
    """Plain data of a JSON text, as strict as the format: no NaN, no key twice, not endlessly deep.

    Raises:
        SchemaError: it is not such a text.
    """
    try:
        data = json.loads(text, parse_constant=_refuse, object_pairs_hook=_once)
    except RecursionError:
        raise SchemaError("it is not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise SchemaError(f"it is not valid JSON ({_short(str(error))})") from None
    _walk(data, _DEEPEST)
    return data


def read_json(
    path: str | os.PathLike[str], what: str, *, error: type[ActTailError] = ActTailError
) -> Any:
    """Plain data of a JSON file.

    Args:
        path: the file.
        what: the thing that it should be, for the message: "a plan".
        error: raised for whatever is wrong.
    """
    try:
        file = Path(path)
        if file.stat().st_size > _LARGEST:
            raise error(f"{path} is not {what}: it is larger than {_LARGEST >> 20} MiB")
        return parse(file.read_bytes())
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror or problem}") from problem
    except SchemaError as problem:
        raise error(f"{path} is not {what}: {problem}") from None


def read_kept(path: str | os.PathLike[str], kind: type[T]) -> T | None:
    """What an earlier run kept in a JSON file; None, to be made again, if there is none or it is damaged.

    Args:
        path: the file.
        kind: see :func:`checked`.
    """
    try:
        return checked(kind, read_json(path, "what was kept"))
    except (ActTailError, SchemaError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {_short(key)!r} is there twice")
            seen.add(key)
    return found


def _walk(value: Any, left: int) -> None:
    """Refuse what is too deep, or holds a number that JSON has not."""
    if left == 0:
        raise SchemaError(f"it is nested more than {_DEEPEST} deep")
    if isinstance(value, dict):
        for item in value.values():
            _walk(item, left - 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _walk(item, left - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise SchemaError("it holds a number that is not finite")


def _first(error: Any) -> str:
    """One line about the first thing that is wrong, with where it is."""
    found = error.errors(include_url=False)[0]
    *parents, last = [_short(str(part)) for part in found["loc"]] or [""]
    above = ".".join(parents) or "it"
    if found["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{above} has the unknown key {last!r}"
    if found["type"] in ("missing", "missing_argument"):
        return f"{above} lacks the key {last!r}"
    where = ".".join((*parents, last)) or "it"
    said = found["msg"][:1].lower() + found["msg"][1:]
    outside = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "predicate_failed",
               "too_long", "too_short", "string_too_long", "string_too_short"}  # fmt: skip
    problem = f"is out of range: {said}" if found["type"] in outside else f"is wrong: {said}"
    return f"{where} {problem} (it is {_short(repr(found['input']))})"


def _short(text: str) -> str:
    text = " ".join(clean(text).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
