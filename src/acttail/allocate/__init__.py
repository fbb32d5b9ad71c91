"""Allocators: rules that turn a requested model sparsity into one sparsity per projection.

A new allocator is one new file here and one line in the registry.
"""

from acttail.allocate.base import Allocation, Allocator, Needs
from acttail.allocate.context import AllocationContext
from acttail.allocate.registry import (
    ALLOCATORS,
    DEFAULT,
    budgeted,
    check_head,
    get,
    make_plan,
    measures_curves,
    needs_text,
    with_curves,
)
from acttail.allocate.selection import SELECTIONS

__all__ = [
    "ALLOCATORS",
    "DEFAULT",
    "SELECTIONS",
    "Allocation",
    "AllocationContext",
    "Allocator",
    "Needs",
    "budgeted",
    "check_head",
    "get",
    "make_plan",
    "measures_curves",
    "needs_text",
    "with_curves",
]
