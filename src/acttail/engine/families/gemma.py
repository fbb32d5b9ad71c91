"""Gemma 1 to 3: norms whose weight is an offset from 1, scaled embeddings; from 2 on four norms a block."""

import math
from typing import Any

from acttail.engine.families.family import FOUR_NORMS, HEAD_NORMS, TWO_NORMS, Family, typed_window


def _root_of_hidden(config: Any) -> float:
    return math.sqrt(config.hidden_size)


GEMMA = Family(norms=TWO_NORMS, norm_shift=1.0, embedding_scale=_root_of_hidden)
GEMMA2 = Family(
    norms=FOUR_NORMS, norm_shift=1.0, activation=("hidden_activation", "hidden_act"), window=typed_window,
    embedding_scale=_root_of_hidden, attention_scalar="query_pre_attn_scalar",
    attention_softcap="attn_logit_softcapping", logit_softcap="final_logit_softcapping",
)  # fmt: skip
GEMMA3 = Family(
    norms=FOUR_NORMS | HEAD_NORMS, norm_shift=1.0, activation=("hidden_activation", "hidden_act"),
    window=typed_window, embedding_scale=_root_of_hidden, attention_scalar="query_pre_attn_scalar",
    logit_softcap="final_logit_softcapping",
)  # fmt: skip
