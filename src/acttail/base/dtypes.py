"""Floating-point widths by name. Both spellings are taken everywhere: torch's and the short one."""

FLOATS = ("float32", "bfloat16", "float16")
# bfloat16 where the device multiplies it, else float32; acttail.model.precision says which.
FAST = "fast"
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_LONG = {short: name for name, short in _SHORT.items()}


def short_name(name: str) -> str:
    """``bf16`` for ``bfloat16``; any other name as it is."""
    return _SHORT.get(name, name)


def name_of(dtype: object) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def torch_name(name: str) -> str:
    """``bfloat16`` for ``bf16``; any other name as it is."""
    return _LONG.get(name, name)
