"""The transformers plug-in: sparse models survive save_pretrained and from_pretrained.

The plan travels in config.json as a quantization config of method "acttail"; the weights are the
dense model's own. A process that has not imported acttail loads such a checkpoint dense, with a
warning of transformers.
"""

from typing import Any

import torch

from acttail.model.hf import forget_quantizer, quantizers
from acttail.model.relu import rectify_, register
from acttail.plan import SparsityPlan
from acttail.sparse.apply import sparsify_
from acttail.sparse.hf_config import METHOD, ActTailConfig

_HF = quantizers()


@_HF.register_quantizer(METHOD)
class ActTailQuantizer(_HF.quantizer):  # type: ignore[misc,name-defined]
    """Makes the modules sparse before the weights arrive, and checks the weights afterwards."""

    requires_calibration = False

    def __init__(self, quantization_config: ActTailConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan = SparsityPlan.from_dict(quantization_config.plan)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        rectify_(model)
        prefill = self.quantization_config.prefill
        return sparsify_(model, self.plan, prefill=prefill, check_contents=False)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        forget_quantizer(model)
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


register()
