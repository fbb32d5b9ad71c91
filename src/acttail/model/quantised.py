"""Checkpoints that another tool has quantised: told by their config or by their tensors, and refused by name."""

from collections.abc import Iterable, Mapping
from typing import Any

from acttail.errors import ModelError

# What a tensor's name ends with -> the tools that write it.
_MARKS: dict[str, str] = {
    ".weight_scale_inv": "FP8 in blocks",
    ".weight_packed": "compressed-tensors",
    ".weight_zero_point": "compressed-tensors",
    ".weight_shape": "compressed-tensors",
    ".weight_scale": "compressed-tensors or FP8",
    ".weight_scale_2": "ModelOpt NVFP4",
    ".input_scale": "FP8",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".SCB": "bitsandbytes",
    ".weight.absmax": "bitsandbytes",
    ".weight.quant_map": "bitsandbytes",
    "_proj_blocks": "MXFP4",
    "_proj_scales": "MXFP4",
}
# safetensors' names of the types that weights are kept in as they are.
_FLOATS = {"F64", "F32", "F16", "BF16"}
# Those that no buffer of a model has, so that whatever has them is a matrix.
_LEVELS = ("F8", "F6", "F4")
_REMEDY = "acttail reads floating-point weights and GGUF files: take one of those"


def check_method(name: str, carried: Mapping[str, Any]) -> None:
    """Refuse the quantization config of a checkpoint, unless acttail wrote it.

    Args:
        name: of the model.
        carried: its quantization config, empty if it has none.

    Raises:
        ModelError: it is another tool's; names the method.
    """
    method = carried.get("quant_method")
    if carried and method != "acttail":
        given = getattr(method, "value", method) or "a method that is not named"
        raise ModelError(f"the weights of {name} are quantised ({given}); {_REMEDY}")


def check_stored(name: str, stored: Iterable[tuple[str, str]]) -> None:
    """Refuse tensors that are levels without their meaning.

    Args:
        name: of the model.
        stored: (name, safetensors' name of its type) of each tensor of the checkpoint.

    Raises:
        ModelError: one is a scale or zero point, or a weight of another type than a float; names it.
    """
    for key, kind in stored:
        tool = next((tool for mark, tool in _MARKS.items() if key.endswith(mark)), None)
        if tool is not None:
            raise ModelError(f"the weights of {name} are quantised ({tool}: {key}); {_REMEDY}")
        if kind.startswith(_LEVELS) or (key.endswith("weight") and kind not in _FLOATS):
            raise ModelError(
                f"the weights of {name} are quantised ({kind} without a scale: {key}); {_REMEDY}"
            )
