"""Granite: Llama's blocks with a factor at every joint."""

from typing import Any

from acttail.engine.families.family import TWO_NORMS, Family


def _embedding_multiplier(config: Any) -> float:
    return float(config.embedding_multiplier)


GRANITE = Family(
    norms=TWO_NORMS, embedding_scale=_embedding_multiplier, attention_scale="attention_multiplier",
    residual_scale="residual_multiplier", logit_divisor="logits_scaling",
)  # fmt: skip
