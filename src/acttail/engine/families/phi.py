"""Phi: 1, 1.5 and 2 have one LayerNorm for both halves of a block, and biases; Phi-3 is Llama's, projections fused."""

from acttail.engine.families.family import FUSED, GATELESS, TWO_NORMS, Family, every_window

PHI = Family(
    norms={"input_norm": "input_layernorm"}, norm_eps="layer_norm_eps", layer_norm=True, projections=GATELESS,
    final_norm="final_layernorm", parallel=True,
)  # fmt: skip
# q, k, v and gate, up each in one matrix, and an optional window.
PHI3 = Family(norms=TWO_NORMS, projections=FUSED, window=every_window)
