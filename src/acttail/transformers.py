"""The transformers plug-in: sparse models survive save_pretrained and from_pretrained.

The plan travels in config.json as a quantization config of method "acttail"; the weights are the
dense model's own. A process that has not imported acttail loads such a checkpoint dense, with a
warning of transformers.
"""

from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from acttail.plan import SparsityPlan
from acttail.sparsify import sparsify_

METHOD = "acttail"


@register_quantization_config(METHOD)
class ActTailConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A plan and its prefill policy, as transformers stores them in config.json.

    Args:
        plan: :meth:`acttail.SparsityPlan.to_dict`.
        prefill: the prefill policy.
    """

    def __init__(self, plan: dict[str, Any], prefill: str = "all", **_: Any) -> None:
        self.quant_method = METHOD
        self.plan = plan
        self.prefill = prefill


@register_quantizer(METHOD)
class ActTailQuantizer(HfQuantizer):  # type: ignore[misc]
    """Makes the modules sparse before the weights arrive, and checks the weights afterwards."""

    requires_calibration = False

    def __init__(self, quantization_config: ActTailConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan = SparsityPlan.from_dict(quantization_config.plan)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        prefill = self.quantization_config.prefill
        return sparsify_(model, self.plan, prefill=prefill, check_contents=False)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # The weights are ordinary floats: what transformers forbids for quantized models
        # (.half(), .to(dtype), training) is fine here, so the model does not count as one.
        model.is_quantized = False
        del model.hf_quantizer
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                module.config._is_quantized = False
        placed = all(p.device.type != "meta" for p in model.parameters())
        return sparsify_(
            model, self.plan, prefill=self.quantization_config.prefill, check_contents=placed
        )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Any dtype will do."""
        return dtype

    def is_serializable(self, **_: Any) -> bool:
        """The plan is plain JSON."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through the entries that were kept."""
        return True
