"""Qwen 2 and 3: Llama's blocks with windows by block; Qwen 3 norms each head's query and key.

With experts some blocks may still have one MLP; Qwen 2 has an MLP beside them that every token visits.
"""

from acttail.engine.families.family import (
    HEAD_NORMS,
    TWO_NORMS,
    Family,
    Routing,
    every_window,
    typed_window,
)

QWEN2 = Family(norms=TWO_NORMS, window=typed_window)
QWEN3 = Family(norms=TWO_NORMS | HEAD_NORMS, window=typed_window)
QWEN2_MOE = Family(
    norms=TWO_NORMS,
    window=typed_window,
    routing=Routing(normalised="norm_topk_prob", shared=True),
)
QWEN3_MOE = Family(
    norms=TWO_NORMS | HEAD_NORMS,
    window=every_window,
    routing=Routing(normalised="norm_topk_prob"),
)
