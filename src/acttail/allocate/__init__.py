"""Allocators: rules that turn a requested model sparsity into one sparsity per projection.

A new allocator is one new file here and one line in the registry.
"""

from acttail.allocate.base import AllocationContext, Allocator
from acttail.allocate.registry import ALLOCATORS, DEFAULT, get, make_plan

__all__ = ["ALLOCATORS", "DEFAULT", "AllocationContext", "Allocator", "get", "make_plan"]
