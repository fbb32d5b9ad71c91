"""What the page reads of a row of results: the schemas of evaluations and of benchmarks.

A row may hold more: it is a record of how a number was made, and grows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from annotated_types import Ge, Gt, Len

from acttail.base.schema import OPEN, Name, NotNegative, SchemaError, Share, checked

_Number = Annotated[float, Gt(0)]
_Tokens = Annotated[float, Ge(0)]  # a table's numbers are all floats


@dataclass(frozen=True)
class _Metric:
    __pydantic_config__ = OPEN
    value: float
    stderr: NotNegative | None


@dataclass(frozen=True)
class _Task:
    __pydantic_config__ = OPEN
    metrics: Annotated[dict[Name, _Metric], Len(1)]


@dataclass(frozen=True)
class _Quality:
    """A record of `compare`, `eval` or `sweep`; a number that was not finite is null."""

    __pydantic_config__ = OPEN
    sparsity: Share = 0.0
    allocator: Name | None = None
    rule: Name | None = None
    realised_sparsity: Share | None = None
    perplexity: _Number | None = None
    perplexity_stderr: NotNegative | None = None
    ratio_to_uniform: _Number | None = None
    kl: float | None = None
    kl_stderr: NotNegative | None = None
    top1: Share | None = None
    top1_stderr: NotNegative | None = None
    scored: _Tokens | None = None
    windows: _Tokens | None = None
    window: _Tokens | None = None
    stride: _Tokens | None = None
    tasks: dict[Name, _Task] | None = None


# What a table's text is read as numbers of.
NUMERIC = frozenset(f.name for f in fields(_Quality)) - {"allocator", "rule", "tasks"}


@dataclass(frozen=True)
class _Ratio:
    __pydantic_config__ = OPEN
    median: _Number
    low: _Number
    high: _Number


@dataclass(frozen=True)
class _Speed:
    """A record of `bench`."""

    __pydantic_config__ = OPEN
    tokens_per_second: Annotated[dict[Name, _Number], Len(1)]
    ratios: dict[Name, _Ratio]
    sparsity: Share
    dtype: Name
    threads: Annotated[int, Ge(1)]
    rounds: Annotated[int, Ge(1)]
    prompt_tokens: Annotated[int, Ge(1)]
    new_tokens: Annotated[int, Ge(1)]
    bytes_per_token: dict[Name, _Number] = field(default_factory=dict)
    bandwidth_share: dict[Name, NotNegative] = field(default_factory=dict)


def is_speed(row: Mapping[str, Any]) -> bool:
    """Whether a row is, by its keys, one of `bench`.

    Raises:
        SchemaError: it is of no kind that is known, or one of its fields is wrong; names it.
    """
    if "tokens_per_second" in row and "ratios" in row:
        speed = checked(_Speed, row)
        for name in speed.bandwidth_share:
            if name not in speed.bytes_per_token:
                raise SchemaError(f"bytes_per_token lacks the key {name!r}")
        return True
    if "perplexity" in row or "tasks" in row:
        checked(_Quality, row)
        return False
    raise SchemaError(f"its rows hold {', '.join(list(row)[:4]) or 'nothing'}")
