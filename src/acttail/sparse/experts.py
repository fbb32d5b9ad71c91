"""Stacked experts of transformers whose inputs are masked first, expert by expert."""

import inspect

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from acttail.errors import ModelError
from acttail.sparse.modules import Made
from acttail.sparse.rules import Rule
from acttail.sparse.state import SparseState, select


class SparseExperts(Made):
    """Mix-in of transformers' stacked experts: each expert masks its inputs with its own k."""

    acttail_rules: dict[str, list[Rule]]
    acttail_name: str
    acttail_state: SparseState

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [tokens, d].
            top_k_index: [tokens, top_k] expert indices.
            top_k_weights: [tokens, top_k].
        """
        output = torch.zeros_like(hidden_states)
        entry = "gate_up_proj" if self.has_gate else "up_proj"  # type: ignore[attr-defined]
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:  # type: ignore[attr-defined]
                continue  # the slot of a token that goes nowhere
            token, slot = torch.where(top_k_index == expert)
            hidden = self._project(entry, expert, hidden_states[token], token)
            gated = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)  # type: ignore[attr-defined]
            out = self._project("down_proj", expert, gated, token)
            if getattr(self, "has_post_expert_norm", False):
                out = self.post_expert_norm(out)  # type: ignore[attr-defined]
            out = out * top_k_weights[token, slot, None]
            output.index_add_(0, token, out.to(output.dtype))
        return output

    def _project(
        self, parameter: str, expert: int, x: torch.Tensor, token: torch.Tensor
    ) -> torch.Tensor:
        name = f"{self.acttail_name}.{parameter}.{expert}"
        masked = select(x, self.acttail_rules[parameter][expert], self.acttail_state, name, token)
        weight = getattr(self, parameter)[expert]
        if getattr(self, "is_transposed", False):
            weight = weight.T
        bias = getattr(self, f"{parameter}_bias", None)
        return F.linear(masked, weight, None if bias is None else bias[expert])


def check_experts(path: str, module: nn.Module) -> None:
    """Make sure that :class:`SparseExperts` can stand in for a module of stacked experts.

    Args:
        path: of the module, for the message.
        module: the experts.

    Raises:
        ModelError: it calls its experts in another way.
    """
    parameters = list(inspect.signature(module.forward).parameters)
    # The decorator of transformers wraps forward; its own fields tell the supported form.
    if not hasattr(module, "has_gate") and parameters[:3] != [
        "hidden_states", "top_k_index", "top_k_weights",
    ]:  # fmt: skip
        raise ModelError(
            f"the experts {path} ({type(module).__name__}) are of a form acttail cannot run"
        )
