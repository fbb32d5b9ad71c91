"""Biases on projections that had none, as far as the model's own config knows how to say so."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from acttail.errors import ModelError
from acttail.model.hf import meta_model
from acttail.model.projections import find_projections


@dataclass(frozen=True)
class Added:
    """What was added to a model.

    Attributes:
        modules: paths of the projections that got a bias.
        flags: keys of the config that were set.
    """

    modules: tuple[str, ...]
    flags: tuple[str, ...]


def _parameters(config: Any) -> set[str]:
    return {name for name, _ in meta_model(copy.deepcopy(config)).named_parameters()}


def by_flag(model: Any) -> dict[str, frozenset[str]]:
    """Key of the config -> paths of the projections that it would give a bias.

    A key is any that is false and speaks of a bias, such as ``attention_bias``; what it really adds is
    asked of transformers, by the model's modules without weights.

    Args:
        model: a causal LM of transformers.
    """
    config = copy.deepcopy(model.config)
    given = config.get_text_config().to_dict()
    before = _parameters(config)
    wanted = {f"{p.module}.bias" for p in find_projections(model)}
    found: dict[str, frozenset[str]] = {}
    for key in (k for k, v in given.items() if v is False and "bias" in k.split("_")):
        tried = copy.deepcopy(config)
        setattr(tried.get_text_config(), key, True)
        more = _parameters(tried) - before
        if more and more <= wanted:
            found[key] = frozenset(n.removesuffix(".bias") for n in more)
    return found


def possible(model: Any) -> Added:
    """The projections that could get a bias, and the keys of the config that say so.

    Args:
        model: a causal LM of transformers.
    """
    found = by_flag(model)
    return Added(tuple(sorted(frozenset().union(*found.values()))), tuple(found))


def add_biases(model: Any) -> Added:
    """Give every projection that can carry one a bias of zeros, and note it in the config.

    Args:
        model: a causal LM of transformers, in place.

    Raises:
        ModelError: no projection of the architecture has or can have a bias.
    """
    found = possible(model)
    has = any(
        isinstance(getattr(model.get_submodule(p.module), "bias", None), nn.Parameter)
        for p in find_projections(model)
    )
    if not found.modules and not has:
        raise ModelError(
            f"{model.config.get_text_config().model_type} models have no place for a bias on a projection: "
            "train norm, lora or all"
        )
    put_zeros(model, found)
    return found


def put_zeros(model: Any, added: Added) -> None:
    """Give projections biases of zeros, and note it in the config.

    Args:
        model: in place.
        added: which, and by which keys.
    """
    for path in added.modules:
        module = model.get_submodule(path)
        weight: torch.Tensor = module.weight  # [d_out, d_in]
        module.bias = nn.Parameter(weight.new_zeros(weight.shape[0]))
    _set(model, added.flags, value=True)


def remove_biases(model: Any, added: Added) -> None:
    """Take out what :func:`put_zeros` put in.

    Args:
        model: in place.
        added: what it was given.
    """
    for path in added.modules:
        model.get_submodule(path).bias = None
    _set(model, added.flags, value=False)


def _set(model: Any, flags: tuple[str, ...], *, value: bool) -> None:
    for key in flags:
        setattr(model.config.get_text_config(), key, value)
