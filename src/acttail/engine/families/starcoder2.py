"""StarCoder2: LayerNorms, an MLP without a gate, biases everywhere, and an optional window."""

from acttail.engine.families.family import GATELESS, TWO_NORMS, Family, every_window

STARCODER2 = Family(
    norms=TWO_NORMS,
    norm_eps="norm_epsilon",
    layer_norm=True,
    projections=GATELESS,
    window=every_window,
)
