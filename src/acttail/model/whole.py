"""The whole model in memory, by transformers: in which dtype, on which devices."""

from typing import Any

import torch

from acttail.base.dtypes import FAST, FLOATS, torch_name
from acttail.base.files import cache_dir, cannot_write
from acttail.base.progress import Progress
from acttail.errors import ActTailError, ModelError
from acttail.model.contents import check_report
from acttail.model.hf import dequantised, reading, refused_code, tied_parameters
from acttail.model.names import ModelSource
from acttail.model.precision import fast_dtype
from acttail.model.weights import StoredWeights


def dtype_of(
    name: str | torch.dtype, device: str | torch.device = "cpu", *, spread: bool = False
) -> str | torch.dtype:
    """A torch dtype, or ``auto``.

    Args:
        name: ``auto``, ``fast`` (what the device multiplies fastest), or a dtype.
        device: where the model is to be.
        spread: over the devices there are, accelerators first, instead.

    Raises:
        ModelError: no such dtype.
    """
    if not isinstance(name, str) or name == "auto":
        return name
    if name == FAST:
        return fast_dtype("cuda" if spread and torch.cuda.is_available() else device)
    if torch_name(name) not in FLOATS:
        raise ModelError(f"unknown dtype {name!r}: use auto, {FAST}, {', '.join(FLOATS)}")
    found: torch.dtype = getattr(torch, torch_name(name))
    return found


def placement(
    device_map: str | dict[str, Any] | None, max_memory: dict[str | int, str] | None
) -> dict[str, Any]:
    """Arguments of from_pretrained for a model on several devices or partly on disk; empty for neither.

    Raises:
        ModelError: accelerate is not installed.
    """
    from importlib.util import find_spec

    if device_map is None and max_memory is None:
        return {}
    if find_spec("accelerate") is None:
        raise ModelError("device maps need accelerate: pip install accelerate")
    folder = cache_dir() / "offload"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error.strerror or str(error)) from error
    return {
        "device_map": device_map or "auto",
        "max_memory": max_memory,
        "offload_folder": str(folder),
    }


def load_whole(
    source: ModelSource, config: Any, dtype: str | torch.dtype, *, trust_remote_code: bool = False,
    spread: dict[str, Any] | None = None, progress: Progress | None = None,
) -> Any:  # fmt: skip
    """Load a causal LM.

    Args:
        source: where it is.
        config: its config.
        dtype: of its weights; ``auto`` is the checkpoint's own, float32 for a GGUF.
        trust_remote_code: run code that the model's repository ships.
        spread: of :func:`placement`.
        progress: called with (tensors done, tensors).

    Raises:
        ModelError: it cannot be read, is kept as pickle, or does not fill the model.
    """
    from transformers import AutoModelForCausalLM

    where, arguments = source.location()
    extra: dict[str, Any] = {"trust_remote_code": trust_remote_code, **(spread or {})}
    if source.gguf is not None:
        extra |= dequantised()
        dtype = torch.float32 if dtype == "auto" else dtype
    else:
        extra["use_safetensors"] = True
    try:
        with reading(source.gguf, progress):
            model, report = AutoModelForCausalLM.from_pretrained(
                where, config=config, dtype=dtype, output_loading_info=True, **arguments, **extra
            )
    except ActTailError:
        raise
    except Exception as error:
        raise (refused_code(source.name, error) or source.failure(error)) from error
    # What it says is missing has been filled with random numbers.
    check_report(source.name, model, sorted(report["missing_keys"]), report["unexpected_keys"])
    return model


def fill_whole(
    weights: StoredWeights, skeleton: Any, dtype: str | torch.dtype, *,
    spread: dict[str, Any] | None = None, progress: Progress | None = None,
) -> Any:  # fmt: skip
    """A causal LM of weights that transformers does not read, matrix by matrix.

    Args:
        weights: that hold every parameter by its name in the model.
        skeleton: the model on the meta device.
        dtype: of its weights; ``auto`` is float32.
        spread: of :func:`placement`.
        progress: called with (tensors done, tensors).

    Raises:
        ModelError: a parameter is missing or of another shape.
    """
    chosen = torch.float32 if isinstance(dtype, str) else dtype
    tied = tied_parameters(skeleton)
    config = skeleton.config
    wanted = skeleton.state_dict()
    state: dict[str, torch.Tensor] = {}
    for done, (name, parameter) in enumerate(wanted.items(), 1):
        same = [n for n in tied.get(name, ()) if n in state]
        if not same or weights.apart(name, same[0]):
            if same:  # whatever the config says
                config.tie_word_embeddings = False
            value = weights.tensor(name)
            if value.shape != parameter.shape:
                raise ModelError(
                    f"{name} of {weights.name} has shape {tuple(value.shape)}, by its config {tuple(parameter.shape)}; "
                    "the config and the weights do not belong together"
                )
            state[name] = value.to(chosen)
        if progress is not None:
            progress(done, len(wanted))
    with reading():
        model = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, dtype=chosen, **(spread or {})
        )
    weights.finish(model)
    return model
