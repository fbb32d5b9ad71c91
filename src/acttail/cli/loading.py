"""Models and calibration as the commands load them, with progress on stderr."""

from typing import TYPE_CHECKING, Any

from acttail.base.progress import Progress
from acttail.cli.judge import check_spread
from acttail.cli.progress import work

if TYPE_CHECKING:
    from acttail.calibrate.calibration import Calibration
    from acttail.calibrate.text import Text
    from acttail.model.opened import Opened


def load_model(
    model: "str | Opened", dtype: str, *, trust_remote_code: bool = False, device_map: str | None = None,
    max_memory: str | None = None, device: str = "cpu",
) -> tuple[Any, Any]:  # fmt: skip
    """Load a model, saying so on stderr if it takes a while.

    Raises:
        ModelError: see :func:`acttail.load`.
        ActTailError: see :func:`acttail.cli.judge.check_spread`.
    """
    from acttail.model.load import load

    limits = check_spread(device_map, max_memory)
    with work(f"loading {model if isinstance(model, str) else model.name}"):
        return load(
            model, dtype=dtype, trust_remote_code=trust_remote_code,
            device_map=device_map, max_memory=limits, device=device,
        )  # fmt: skip


def calibration_for(
    model: Any, tokenizer: Any, text: "Text | None", tokens: int, progress: Progress
) -> "Calibration":
    """A Calibration; without a text, one sampled from the model itself."""
    from acttail.calibrate.calibration import Calibration
    from acttail.calibrate.selftext import sample_text

    if text is None:
        text = sample_text(model, tokenizer, tokens=tokens, progress=progress)
    return Calibration(model, tokenizer, text, tokens=tokens, progress=progress)
