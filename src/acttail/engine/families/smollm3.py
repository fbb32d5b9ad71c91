"""SmolLM 3: Llama's blocks, every fourth without a rotary embedding."""

from typing import Any

from acttail.engine.families.family import TWO_NORMS, Family, typed_window


def _turned(config: Any, index: int) -> bool:
    # The list says 1 where there is one.
    return bool(config.no_rope_layers[index])


SMOLLM3 = Family(norms=TWO_NORMS, window=typed_window, turned=_turned)
