"""A goal for the bytes that a decoded token reads, counted as :mod:`acttail.engine.accounting` counts them."""

from collections.abc import Mapping

import torch

from acttail.allocate.goal import Goal, Price
from acttail.engine.accounting import loaded_bytes, projection_bytes
from acttail.engine.config import EngineConfig
from acttail.engine.source import outlay_of
from acttail.engine.spec import UnsupportedModelError
from acttail.errors import BudgetError
from acttail.model.opened import Opened
from acttail.model.projections import find_head, find_projections

# What a plan says of its bytes.
READ_SHARE = "read share"


def check_read_share(share: float) -> None:
    """Refuse what is no share.

    Raises:
        BudgetError: it is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise BudgetError(f"a read share must be a number above 0 and at most 1, got {share}")


def read_goal(model: Opened, config: EngineConfig, share: float) -> Goal:
    """The most bytes that a token may read, as a share of the dense model's; the KV cache is not counted.

    Args:
        model: opened; its shapes are read, its matrices are not.
        config: formats that it is decoded in. What the native engine does not run is counted in transformers'
            dtype.
        share: above 0 and at most 1.

    Raises:
        BudgetError: no such share.
        ModelError: the model cannot be read.
    """
    check_read_share(share)
    try:
        rows, whole, fixed, name = _packed(model, config)
    except UnsupportedModelError:
        rows, whole, fixed, name = _loaded(model, config)
    prices = {n: Price((0.0, 1.0), (scales, scales + r)) for n, (r, scales) in rows.items()}
    dense = (
        fixed + sum(whole.values()) + sum(p.at(1.0) for n, p in prices.items() if n not in whole)
    )

    def describe(read: float) -> Mapping[str, str]:
        said = f"{read / dense:.4f} of the {dense / 1e6:,.1f} MB that a dense token reads in {name}"
        return {READ_SHARE: f"{said} ({share:g} was asked for)"}

    return Goal(
        f"a read share of {share:g}", share * dense, dense, fixed, prices, whole, describe,
        lambda read: read / dense,
    )  # fmt: skip


_Counted = tuple[dict[str, tuple[float, float]], dict[str, float], float, str]


def _packed(model: Opened, config: EngineConfig) -> _Counted:
    """(projection -> bytes of rows and scales, bytes of a head that is read whole, of all else, the format)."""
    found = outlay_of(model, config)
    layout, head = found.layout, found.head_by_inputs
    rows = projection_bytes(layout)
    if found.head not in rows:
        rows[found.head] = head.rows * head.row_bytes, head.scale_bytes
        return rows, {found.head: layout.head_shape.bytes}, found.other, layout.dtype
    return rows, {}, found.other, layout.dtype


def _loaded(model: Opened, config: EngineConfig) -> _Counted:
    """:func:`_packed` for transformers, on the meta device."""
    name = config.weights.transformers
    skeleton = model.skeleton.to(getattr(torch, name))
    read = loaded_bytes(skeleton)
    size = getattr(torch, name).itemsize
    rows = {p.name: (p.cost * size, 0.0) for p in find_projections(skeleton)}
    head = find_head(skeleton)
    if head is None:
        return rows, {}, read.other + read.lm_head, config.weights.name
    rows[head.name] = head.cost * size, 0.0
    return rows, {head.name: float(read.lm_head)}, read.other, config.weights.name
