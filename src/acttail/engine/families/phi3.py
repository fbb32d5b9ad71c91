"""Phi-3: Llama's blocks with q, k, v and gate, up each in one matrix, and an optional window."""

from acttail.engine.families.family import FUSED, TWO_NORMS, Family, every_window

PHI3 = Family(norms=TWO_NORMS, projections=FUSED, window=every_window)
