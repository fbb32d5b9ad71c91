"""Arguments judged before a model is opened: parsed, or refused in one line.

Opening a model takes from seconds to minutes; whoever mistyped an option should not wait for it. What is
valid is the library's knowledge: these functions ask it.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acttail.errors import ActTailError

if TYPE_CHECKING:
    from acttail.calibrate.curves import SensitivityCurves
    from acttail.calibrate.text import Text
    from acttail.engine import Sampling
    from acttail.plan import SparsityPlan
    from acttail.sparse.policy import PrefillPolicy

# accelerate's words; anything else is a device of torch's.
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_SIZE = re.compile(r"\d+(\.\d+)?\s*([KMG]I?B)?", re.IGNORECASE)


@contextmanager
def option(name: str) -> Iterator[None]:
    """Inside, what is refused is refused under the name of this option."""
    try:
        yield
    except ActTailError as error:
        if name not in str(error):
            error.args = (f"{name}: {error}",)
        raise


def settings(pairs: list[str] | None) -> dict[str, str]:
    """Parse KEY=VALUE pairs.

    Raises:
        ActTailError: a pair without '='.
    """
    parsed = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ActTailError(f"--set takes KEY=VALUE, got {pair!r}")
        parsed[key.strip()] = value.strip()
    return parsed


def names(text: str, what: str) -> list[str]:
    """Parse comma-separated names, each once.

    Raises:
        ActTailError: there is none.
    """
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ActTailError(f"{what} is empty")
    return found


def number_list(text: str, what: str) -> list[float]:
    """Parse comma-separated numbers.

    Raises:
        ActTailError: something is not a number, or there is none.
    """
    try:
        return [float(part) for part in names(text, what)]
    except ValueError as error:
        raise ActTailError(f"{what} takes numbers separated by commas, got {text!r}") from error


def sparsities(text: str) -> list[float]:
    """Parse comma-separated model sparsities.

    Raises:
        ActTailError: one is no number in [0, 0.99].
    """
    from acttail.maths.budget import check_target

    with option("--sparsity"):
        return [check_target(s) for s in number_list(text, "--sparsity")]


def policy_of(prefill: str | None) -> "PrefillPolicy | None":
    """The prefill policy asked for; None leaves it to the checkpoint, or to the default.

    Raises:
        ActTailError: there is no such policy.
    """
    from acttail.sparse.policy import PrefillPolicy

    with option("--prefill"):
        return None if prefill is None else PrefillPolicy.parse(prefill)


def plan_of(path: str | None) -> "SparsityPlan | None":
    """The plan of a file that was asked for.

    Raises:
        PlanError: it cannot be read, or is none.
    """
    from acttail.plan import SparsityPlan

    with option("--plan"):
        return None if path is None else SparsityPlan.load(path)


def curves_of(path: str | None) -> "SensitivityCurves | None":
    """The sensitivity curves of a file that was asked for.

    Raises:
        PlanError: they cannot be read, or are none.
    """
    from acttail.calibrate.curves import SensitivityCurves

    with option("--curves"):
        return None if path is None else SensitivityCurves.load(path)


def check_of_use(curves: "SensitivityCurves | None", fixed: str | None) -> None:
    """Refuse curves that were given for changing the sparsity where nothing can change it.

    Args:
        curves: of --curves.
        fixed: why the sparsity cannot be changed, None if it can.

    Raises:
        ActTailError: says why.
    """
    if curves is not None and fixed is not None:
        raise ActTailError(f"--curves is of no use: {fixed}")


def text_of(name: str) -> "Text":
    """The text to score.

    Raises:
        TextError: not found, or empty.
    """
    from acttail.calibrate.text import read_text

    with option("--text"):
        return read_text(name)


def check_windows(window: int, tokens: int | None, stride: int | None = None) -> None:
    """Judge how a text is cut.

    Raises:
        TextError: the numbers make no windows of any text.
    """
    from acttail.calibrate.text import check_window

    with option("--window"):
        check_window(window, None, None)
    with option("--stride"):
        check_window(window, None, stride)
    with option("--tokens"):
        check_window(window, tokens, stride)


def sampling_of(**asked: Any) -> "Sampling":
    """How answers are drawn.

    Args:
        asked: fields of :class:`acttail.engine.Sampling`.

    Raises:
        ActTailError: one is out of range.
    """
    from acttail.engine import Sampling

    try:
        return Sampling(**asked)
    except ActTailError as error:
        field, _, rest = str(error).partition(" ")
        raise ActTailError(f"--{field.replace('_', '-')} {rest}") from error


def check_spread(device_map: str | None, max_memory: str | None) -> dict[str | int, str] | None:
    """Judge --device-map and parse --max-memory: device -> size.

    Raises:
        ActTailError: no such device, no DEVICE=SIZE pairs, or accelerate is missing.
    """
    if device_map is None and max_memory is None:
        return None
    if device_map is not None and device_map not in _DEVICE_MAPS:
        import torch

        try:
            torch.device(device_map)
        except (RuntimeError, ValueError) as error:
            raise ActTailError(
                f"--device-map takes {', '.join(_DEVICE_MAPS)} or a device, such as cpu; got {device_map!r}"
            ) from error
    if find_spec("accelerate") is None:
        raise ActTailError("device maps need accelerate: pip install accelerate")
    if max_memory is None:
        return None
    limits: dict[str | int, str] = {}
    for pair in names(max_memory, "--max-memory"):
        device, _, size = pair.partition("=")
        if not device or not _SIZE.fullmatch(size):
            raise ActTailError(f"--max-memory takes DEVICE=SIZE, such as cpu=8GiB; got {pair!r}")
        limits[int(device) if device.isdigit() else device] = size
    return limits


def check_device(name: str) -> str:
    """Judge --device: a device of torch that is there; ``auto`` is its accelerator, or else the processor.

    Raises:
        ActTailError: there is no such device.
    """
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if found is None else str(found)
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ActTailError(
            f"--device takes auto, cpu or a device that torch finds here, such as cuda:0; got {name!r}"
        ) from error
    return name


def sees_text(allocator: str, arguments: Mapping[str, Any], rule: str | None = None) -> bool:
    """Judge an allocator, its arguments, its file of curves and a rule; say whether they need text.

    Raises:
        ActTailError: unknown allocator, argument or rule, or curves neither to be read nor written.
    """
    from acttail.allocate import ALLOCATORS, needs_text
    from acttail.base.files import check_file

    with option("--allocator"):
        if allocator not in ALLOCATORS:
            needs_text(allocator)
    with option("--set"):
        needs_text(allocator, arguments)
    with option("--rule"):
        found = needs_text(allocator, arguments, rule)
    curves = arguments.get("curves")
    if curves and Path(curves).exists():
        curves_of(curves)
    elif curves:
        with option("--curves"):
            check_file(curves)
    return found


def given_curves(
    allocators: Mapping[str, Mapping[str, Any]], path: str | None
) -> dict[str, dict[str, Any]]:
    """Arguments of allocators, with the file of --curves for those that use one.

    Raises:
        ActTailError: none of the allocators does, or one is unknown.
        PlanError: the file is there and holds no curves.
    """
    from acttail.allocate import get, with_curves

    with option("--allocator"):
        for name in allocators:
            get(name)
    with option("--curves"):
        return with_curves(allocators, path)


def head_of(head: bool, no_head: bool) -> bool | None:
    """Whether the output head goes into the budget; None leaves it to the allocator.

    Raises:
        ActTailError: both were asked for.
    """
    if head and no_head:
        raise ActTailError("give one of --head and --no-head")
    return True if head else False if no_head else None


def check_head(allocator: str, head: bool | None) -> None:
    """Judge --head for an allocator.

    Raises:
        ActTailError: unknown allocator, or one that cannot put the head into its budget.
    """
    from acttail.allocate import check_head as check

    with option("--allocator"):
        check(allocator, head)


def calibration_text(
    name: str | None, *, needed: bool, what: str = "this allocator"
) -> "Text | None":
    """The calibration text: a Text, or None for 'self' (and where none is needed); `what` needs it.

    Raises:
        TextError: it is needed and not given, not found, or empty.
    """
    from acttail.calibrate.text import read_text
    from acttail.errors import TextError

    if name is None and needed:
        raise TextError(f"{what} is calibrated: give --calibration-text FILE (or 'self')")
    with option("--calibration-text"):
        return None if name is None or name == "self" else read_text(name)


def metrics_of(text: str) -> list[str]:
    """Parse comma-separated metrics.

    Raises:
        ActTailError: one is unknown, or there is none.
    """
    from acttail.evaluate.perplexity import check_metrics

    found = names(text, "--metrics")
    with option("--metrics"):
        check_metrics(found)
    return found


def check_outputs(output: str | None, **others: str | None) -> None:
    """Judge the files a command would write, those that were asked for.

    Args:
        output: of --output.
        others: of other options, by their names.

    Raises:
        ActTailError: one could not be written.
    """
    from acttail.base.files import check_file

    for name, path in {"output": output, **others}.items():
        if path is not None:
            with option(f"--{name.replace('_', '-')}"):
                check_file(path)


def check_output_folder(path: str) -> None:
    """Judge the folder that --output would make.

    Raises:
        ActTailError: it could not be made or filled.
    """
    from acttail.base.files import check_folder

    with option("--output"):
        check_folder(path)


def check_estimators(estimator: str) -> None:
    """Judge --estimator.

    Raises:
        ActTailError: there is none such.
    """
    from acttail.spectrum.tail import check_estimator

    with option("--estimator"):
        check_estimator(estimator)
