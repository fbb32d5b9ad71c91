"""StableLM: Llama's blocks with LayerNorms."""

from acttail.engine.families.family import TWO_NORMS, Family

STABLELM = Family(
    norms=TWO_NORMS,
    norm_eps="layer_norm_eps",
    layer_norm=True,
    only={"use_parallel_residual": False},
)
