"""What a checkpoint holds against what its model wants: names and shapes, from headers alone.

transformers fills what is missing with random numbers and leaves out what it does not know; here both are
refused, in the same words whoever reads the weights.
"""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from acttail.errors import ActTailWarning, ModelError
from acttail.model.hf import expected_absent, tied_parameters

Shape = tuple[int, ...]
_REMEDY = (
    "the config and the weights do not belong together, or a file is missing; fetch the model again"
)


def check_contents(
    name: str, model: Any, found: Mapping[str, Shape | None], unread: Collection[str] = (), *,
    whole: bool = False,
) -> None:  # fmt: skip
    """Refuse a checkpoint that does not fill a model, or that the model does not read whole.

    Args:
        name: of the model.
        model: its modules, on the meta device.
        found: parameter -> its shape in the checkpoint; None where only its presence is known.
        unread: tensors of the checkpoint that fill no parameter, by their own names.
        whole: refuse any of them; else those that belong to a module of the model (a bias the config has not)
            are refused, and what is beside it (a vision tower) is warned of.

    Raises:
        ModelError: a parameter is missing or has another shape, or a tensor that counts is not read; names
            the first.
    """
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    tied = tied_parameters(model)
    for key, shape in found.items():
        if shape is not None and shape != wanted.get(key, shape):
            raise ModelError(
                f"{key} has shape {list(shape)} in the checkpoint of {name}, not {list(wanted[key])}; {_REMEDY}"
            )
    missing = [
        key for key in wanted if key not in found and not any(t in found for t in tied.get(key, ()))
    ]
    check_report(name, model, missing, unread, whole=whole)


def check_report(
    name: str, model: Any, missing: Collection[str], unread: Collection[str], *, whole: bool = False
) -> None:
    """Refuse what was loaded only in part; arguments and errors as of :func:`check_contents`.

    Args:
        name: of the model.
        model: its modules, loaded or not.
        missing: parameters that the checkpoint does not fill.
        unread: tensors of the checkpoint that fill no parameter.
        whole: refuse any unread tensor.

    Raises:
        ModelError: as above.
    """
    allowed = expected_absent(model)
    missing = [key for key in missing if not allowed.missing(key)]
    unread = sorted(key for key in unread if not allowed.unread(key))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        strange = f" (it holds {unread[0]}, which nothing reads)" if unread else ""
        raise ModelError(
            f"the checkpoint of {name} has no tensor for {missing[0]}{more}{strange}; {_REMEDY}"
        )
    modules = {path for path, _ in model.named_modules()}
    homeless = next((key for key in unread if whole or key.rpartition(".")[0] in modules), None)
    if homeless is not None:
        raise ModelError(
            f"the checkpoint of {name} holds {homeless}, for which its config has no place: what it computes "
            "would be lost; correct the config or fetch the model again"
        )
    if unread:
        warnings.warn(
            f"{len(unread)} tensors of {name} are not part of its decoder and are not read: {unread[0]}"
            + (" and others" if len(unread) > 1 else ""),
            ActTailWarning,
            stacklevel=2,
        )
