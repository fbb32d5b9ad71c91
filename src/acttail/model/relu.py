"""ReLU after the norms, in front of a block's projections: what config.json says of it, and putting it into a model.

transformers has no key for it, so the config has one of ours, ``acttail_relu``, and its ``hidden_act`` an activation of
ours that computes ReLU: transformers alone knows no such name and refuses to build the model, where it would otherwise
compute another one without a word.
"""

import re
from typing import Annotated, Any

import torch
from annotated_types import Len
from torch import nn

from acttail.base.schema import Name, SchemaError, checked
from acttail.errors import ModelError
from acttail.model.hf import activations
from acttail.model.projections import decoder_blocks

KEY = "acttail_relu"
# What `hidden_act` says of a model whose norms are followed by ReLU.
AFTER_NORMS = "acttail_relu_after_norms"
_FIELDS = Annotated[dict[Name, Annotated[list[Name], Len(1, 8)]], Len(1, 1)]


class ReluAfterNorms(nn.ReLU):
    """ReLU of an MLP whose model has ReLU after its norms, too; refuses to run where that was not put in."""

    rectified = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d].

        Raises:
            ModelError: the model was built without acttail's help.
        """
        if not self.rectified:
            raise ModelError(
                "this model has ReLU after its norms, which was not put in: load it with acttail.load, or with its "
                "plan inside (acttail save)"
            )
        return super().forward(x)


def register() -> None:
    """Let transformers build such models."""
    activations()[AFTER_NORMS] = ReluAfterNorms


def rectified_norms(config: Any) -> tuple[str, ...]:
    """Names, within a decoder block, of the norms that ReLU follows; none for most models.

    Args:
        config: of transformers.

    Raises:
        ModelError: the field is not what acttail writes.
    """
    said = getattr(config.get_text_config(), KEY, None)
    if said is None:
        return ()
    try:
        fields: dict[str, list[str]] = checked(_FIELDS, said)
    except SchemaError as error:
        raise ModelError(f"{KEY} of the config is damaged: {error}") from None
    names = fields.get("norms")
    if names is None or not all(re.fullmatch(r"\w+(\.\w+)*", name) for name in names):
        raise ModelError(
            f'{KEY} of the config is damaged: it is {{"norms": [...]}} with names of modules'
        )
    return tuple(names)


def rectify_(model: Any) -> None:
    """Put ReLU after the norms that a model's config names; nothing where it names none, and never twice.

    Args:
        model: a causal LM of transformers, in place.

    Raises:
        ModelError: a block has no such norm.
    """
    names = rectified_norms(model.config)
    if not names:
        return
    _, blocks = decoder_blocks(model)
    for i, block in enumerate(blocks):
        for name in names:
            try:
                norm = block.get_submodule(name)
            except AttributeError:
                raise ModelError(
                    f"the config puts ReLU after {name}, which block {i} does not have"
                ) from None
            if _relu not in norm._forward_hooks.values():
                norm.register_forward_hook(_relu)
    _ready(model, ready=True)


def straighten_(model: Any) -> None:
    """Undo :func:`rectify_`, whatever the config says by now."""
    for module in model.modules():
        for key in [k for k, hook in module._forward_hooks.items() if hook is _relu]:
            del module._forward_hooks[key]
    _ready(model, ready=False)


def _ready(model: nn.Module, *, ready: bool) -> None:
    for module in model.modules():
        if isinstance(module, ReluAfterNorms):
            module.rectified = ready


def _relu(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """The hook."""
    return torch.relu(output)
