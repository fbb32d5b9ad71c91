"""peft's low-rank adapters on sparse projections, which see the same masked input as the matrix they change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from acttail.errors import ModelError
from acttail.model.projections import find_projections, is_stacked_experts
from acttail.sparse.modules import SparseModule, sparse_class, swap_class
from acttail.sparse.state import select

_NAME = "acttail"


def _mask(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Hook of a wrapper: the matrix and its adapter are given what the rule keeps."""
    base = module.get_base_layer()
    return (
        select(args[0], base.acttail_rule, base.acttail_state, base.acttail_name),
        *args[1:],
    )


class Adapters:
    """Adapters on every projection of the blocks of a sparse model.

    Masking happens before matrix and adapter alike, so that merging changes nothing: the sum of the two
    products is one product with the sum of the two matrices.

    Args:
        model: sparse, in place.
        rank: of the adapters.
        seed: of their random half.

    Raises:
        ModelError: the model has stacked experts, whose matrices are no modules.
    """

    def __init__(self, model: nn.Module, rank: int, seed: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self._model = model
        self._paths = [p.module for p in find_projections(model)]
        stacked = next(
            (path for path in self._paths if is_stacked_experts(model.get_submodule(path))), None
        )
        if stacked is not None:
            raise ModelError(
                f"lora adapts matrices that are modules, and {stacked} holds all its experts in one: "
                "train norm or all"
            )
        plain = {path: type(model.get_submodule(path)) for path in self._paths}
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(self._paths),
            fan_in_fan_out=any(not issubclass(cls, nn.Linear) for cls in plain.values()),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=_NAME)
        self._handles = []
        self._merged: dict[str, torch.Tensor] = {}
        for path in self._paths:
            wrapper: Any = model.get_submodule(path)
            base = wrapper.get_base_layer()
            # The hook masks; masking twice would cost time, and under top-p drop more.
            swap_class(base, type(base).__bases__[1])
            self._handles.append(wrapper.register_forward_pre_hook(_mask))
        self.parameters = {
            name: p for name, p in model.named_parameters() if f".lora_A.{_NAME}" in name or f".lora_B.{_NAME}" in name
        }  # fmt: skip
        model.requires_grad_(False)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the adapters add nothing."""
        wrappers: list[Any] = [self._model.get_submodule(path) for path in self._paths]
        for wrapper in wrappers:
            wrapper.enable_adapters(False)
        try:
            yield
        finally:
            for wrapper in wrappers:
                wrapper.enable_adapters(True)

    def merge(self) -> None:
        """Add the adapters' products to the matrices and take the wrappers out."""
        for path in self._paths:
            wrapper: Any = self._model.get_submodule(path)
            self._merged[path] = wrapper.get_base_layer().weight.detach().clone()
            wrapper.merge(safe_merge=True)
        self._unwrap()

    def undo(self) -> None:
        """The matrices as they were, without wrappers."""
        if not self._merged:
            self._unwrap()
        for path, weight in self._merged.items():
            module: Any = self._model.get_submodule(path)
            module.weight.data = weight

    def _unwrap(self) -> None:
        for handle in self._handles:
            handle.remove()
        for path in self._paths:
            wrapper: Any = self._model.get_submodule(path)
            base = wrapper.get_base_layer()
            swap_class(base, sparse_class(type(base), SparseModule))
            holder, _, name = path.rpartition(".")
            setattr(self._model.get_submodule(holder), name, base)
        # peft's note to itself, which would make a second injection warn of adapters that are gone.
        vars(self._model).pop("peft_config", None)
