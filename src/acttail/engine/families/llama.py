"""Llama and Mistral: two RMSNorms, a gated MLP; Mistral may see a window only."""

from acttail.engine.families.family import TWO_NORMS, Family, every_window

LLAMA = Family(norms=TWO_NORMS)
MISTRAL = Family(norms=TWO_NORMS, window=every_window)
