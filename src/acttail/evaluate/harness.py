"""lm-eval's own command line with a model `acttail`: any Hub model under a plan."""

from collections.abc import Sequence
from typing import Any

from acttail.errors import ActTailError


def register() -> type:
    """Add the model `acttail` to lm-eval's registry.

    Its arguments are those of lm-eval's `hf`, with ``plan`` (a file) and ``prefill`` (a policy).

    Raises:
        ActTailError: lm-eval is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401 - fills the registry first, or it would not be filled at all
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ActTailError("lm-eval needs the extra: pip install 'acttail[tasks]'") from error
    from acttail.model.load import load
    from acttail.plan import SparsityPlan
    from acttail.sparse.apply import sparsify_

    class ActtailLM(HFLM):  # type: ignore[misc]
        """transformers' model under a plan."""

        def __init__(
            self, pretrained: str, plan: str | None = None, prefill: str = "all", dtype: str = "auto", **rest: Any
        ) -> None:  # fmt: skip
            # lm-eval hands on what it cannot read as text: "false" must not be true.
            trust = str(rest.pop("trust_remote_code", False)).lower() in ("true", "1")
            model, tokenizer = load(pretrained, dtype=dtype, trust_remote_code=trust)
            if plan is not None:
                sparsify_(model, SparsityPlan.load(plan), prefill=prefill)
            super().__init__(pretrained=model, tokenizer=tokenizer, **rest)

        def get_model_info(self) -> dict[str, Any]:
            """lm-eval would look the model up on the Hub."""
            return {}

    try:
        register_model("acttail")(ActtailLM)
    except (ValueError, AssertionError):  # registered before in this process
        from lm_eval.api.registry import get_model

        found: type = get_model("acttail")
        return found
    return ActtailLM


def main(arguments: Sequence[str]) -> None:
    """Run lm-eval's command line.

    Args:
        arguments: as for `lm_eval`.

    Raises:
        ActTailError: lm-eval is not installed.
    """
    import sys

    register()
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
