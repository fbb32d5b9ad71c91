"""How a plan travels in a transformers config: a quantization config of method "acttail"."""

from typing import Any

from acttail.model.hf import quantizers

_HF = quantizers()
METHOD = "acttail"


@_HF.register_config(METHOD)
class ActTailConfig(_HF.config):  # type: ignore[misc,name-defined]
    """A plan and its prefill policy, as transformers stores them in config.json.

    Args:
        plan: :meth:`acttail.SparsityPlan.to_dict`.
        prefill: the prefill policy.
    """

    def __init__(self, plan: dict[str, Any], prefill: str = "all", **_: Any) -> None:
        self.quant_method = METHOD
        self.plan = plan
        self.prefill = prefill
