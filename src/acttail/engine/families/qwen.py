"""Qwen 2 and 3: Llama's blocks with windows by block; Qwen 3 norms each head's query and key."""

from acttail.engine.families.family import HEAD_NORMS, TWO_NORMS, Family, typed_window

QWEN2 = Family(norms=TWO_NORMS, window=typed_window)
QWEN3 = Family(norms=TWO_NORMS | HEAD_NORMS, window=typed_window)
