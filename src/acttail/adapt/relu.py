"""ReLU in the place of a model's activation, after *ReLU Strikes Back* (arXiv 2310.04564): swapped in, and out again.

What is computed afterwards is another model, far from the first until it is trained. What transformers reads from its
config is asked of transformers, by the model's modules without weights.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from acttail.adapt.biases import Added, by_flag, put_zeros, remove_biases
from acttail.errors import ActTailError, ModelError
from acttail.model.hf import meta_model
from acttail.model.projections import Projection, decoder_blocks, find_projections
from acttail.model.relu import AFTER_NORMS, KEY, rectified_norms, rectify_, straighten_
from acttail.model.weights import input_device

# Where configs name the activation, and where modules keep it.
_KEYS = ("hidden_activation", "hidden_act", "activation_function")
_PLACES = ("act_fn", "activation_fn", "act")
_INNER = frozenset({"down", "fc2"})
_OUTER = frozenset({"q", "k", "v", "qkv", "gate", "up", "gate_up", "fc1"})
# Tokens that the shift is calibrated on: a quantile over them and every feature of the MLP is sharp to a thousandth.
_SHIFT_TOKENS = 1024
# Share of the MLP's features that a shift is to silence, unless it is said.
ZEROS = 0.9


@dataclass(frozen=True)
class Stage:
    """One row: a name that `--relu` takes.

    Attributes:
        name: of it.
        what: in words.
        norms: whether ReLU follows the norms in front of the projections, too.
        shifts: whether the gate is shifted down before it.
        sparse: kinds of the projections whose input has exact zeros.
    """

    name: str
    what: str
    norms: bool = False
    shifts: bool = False
    sparse: frozenset[str] = _INNER


STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("stage1", "the MLP's activation becomes ReLU"),
        Stage("stage2", "and ReLU follows the norms before q, k, v and gate, up", norms=True, sparse=_INNER | _OUTER),
        Stage("shifted", "ReLU(x - b), b by calibration, in the gate's bias", shifts=True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Relu:
    """What is to be swapped.

    Attributes:
        stage: a name of :data:`STAGES`.
        zeros: share of the MLP's features that the shift silences on the text it is calibrated on, in (0, 1); None
            without a shift, where the default stands with one.

    Raises:
        ActTailError: no such stage, or a share that means nothing to it.
    """

    stage: str
    zeros: float | None = None

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ActTailError(f"no ReLU called {self.stage!r}: use {', '.join(STAGES)}")
        if not STAGES[self.stage].shifts:
            if self.zeros is not None:
                raise ActTailError(
                    f"a share of zeros is what a shift is chosen by, and {self.stage} has none"
                )
        elif self.zeros is None:
            object.__setattr__(self, "zeros", ZEROS)
        elif not 0 < self.zeros < 1:
            raise ActTailError(f"the share of zeros lies between 0 and 1, not at {self.zeros}")

    @property
    def row(self) -> Stage:
        """Of the registry."""
        return STAGES[self.stage]

    def to_dict(self) -> dict[str, Any]:
        """As a plan notes them."""
        return {"stage": self.stage} | ({"zeros": self.zeros} if self.zeros is not None else {})


class Swap:
    """A model with ReLU put in; in place, and undone by :meth:`undo`.

    Args:
        model: a dense causal LM of transformers.
        relu: what to put in.
        ids: [n, T] token ids that a shift is calibrated on.

    Raises:
        ModelError: the model has no activation that its config names, has it already, or has no place for what the
            stage needs; says which stages it has one for.
    """

    def __init__(self, model: Any, relu: Relu, ids: torch.Tensor) -> None:
        self.relu = relu
        self._model = model
        self._name = model.config.get_text_config().model_type
        row = relu.row
        self._config: dict[str, Any] = {}
        self._places: list[tuple[nn.Module, str, nn.Module]] = []
        self._added = Added((), ())
        # Of each gate: its bias as it was, zeros where it had none.
        self._before: dict[str, torch.Tensor] = {}
        self._in = False
        if rectified_norms(model.config) or (
            not row.norms and not row.shifts and self._is_relu(model)
        ):
            raise ModelError(
                f"this {self._name} model has ReLU already; give the one it was made from"
            )
        self._gates = self._shiftable() if row.shifts else []
        norms = self._norms_before_projections() if row.norms else ()
        try:
            self._put_activations(AFTER_NORMS if row.norms else "relu")
            if norms:
                self._set(KEY, {"norms": list(norms)})
            self._in = True
            rectify_(model)
            if row.shifts:
                self._shift(ids)
        except BaseException:
            self.undo()
            raise

    @contextmanager
    def original(self) -> Iterator[None]:
        """Inside, the model computes what it did before, as far as the swap goes."""
        params = self._biases()
        now = {path: p.data for path, p in params.items()}
        for path, p in params.items():
            p.data = self._before[path]
        self._exchange()
        straighten_(self._model)
        try:
            yield
        finally:
            self._exchange()
            rectify_(self._model)
            for path, p in params.items():
                p.data = now[path]

    def undo(self) -> None:
        """Make the model what it was, config included."""
        for path, p in self._biases().items():
            p.data = self._before[path]
        remove_biases(self._model, self._added)
        if self._in:
            self._exchange()
            self._in = False
        straighten_(self._model)
        config = self._model.config.get_text_config()
        for key, value in self._config.items():
            if value is None:
                delattr(config, key)
            else:
                setattr(config, key, value)

    def _biases(self) -> dict[str, nn.Parameter]:
        return {path: self._model.get_submodule(path).bias for path in self._before}

    def _exchange(self) -> None:
        """Each activation for the other one."""
        for i, (module, place, other) in enumerate(self._places):
            now = getattr(module, place)
            setattr(module, place, other)
            self._places[i] = module, place, now

    def _set(self, key: str, value: Any) -> None:
        config = self._model.config.get_text_config()
        self._config.setdefault(key, getattr(config, key, None))
        setattr(config, key, value)

    def _is_relu(self, model: nn.Module) -> bool:
        found = [getattr(module, place) for _, module, place in _activations(model)]
        return bool(found) and all(isinstance(f, nn.ReLU) for f in found)

    def _put_activations(self, name: str) -> None:
        """Set the config, and take the activations that transformers makes of it."""
        config = self._model.config.get_text_config()
        for key in _KEYS:
            if getattr(config, key, None) is not None:
                self._set(key, name)
        skeleton = meta_model(copy.deepcopy(self._model.config))
        found = list(_activations(self._model))
        made = {path: getattr(skeleton.get_submodule(path), place) for path, _, place in found}
        if not found or not all(isinstance(m, nn.ReLU) for m in made.values()):
            raise ModelError(
                f"{self._name} models do not take their activation from the config: it cannot be swapped"
            )
        self._places = [(module, place, made[path]) for path, module, place in found]
        self._exchange()

    def _shiftable(self) -> list[Projection]:
        """The gates, or what the activation reads where there are none, once each has or can have a bias."""
        found = [
            p
            for p in find_projections(self._model)
            if p.kind in ("gate", "fc1") and p.expert is None
        ]
        if found and all(
            isinstance(getattr(self._model.get_submodule(p.module), "bias", None), nn.Parameter)
            for p in found
        ):
            return found
        paths = {p.module for p in found}
        flag = next(
            (f for f, gained in by_flag(self._model).items() if paths and paths <= gained), None
        )
        if flag is None:
            raise ModelError(
                f"{self._name} models have no place for a bias on the gate, which the shift would be: use stage1 or stage2"
            )
        self._added = Added(tuple(sorted(by_flag(self._model)[flag])), (flag,))
        return found

    def _shift(self, ids: torch.Tensor) -> None:
        """Lower every gate by that quantile of its outputs, block by block, each behind the ones before it."""
        put_zeros(self._model, self._added)
        zeros = self.relu.zeros
        assert zeros is not None  # noqa: S101  (judged when made)
        shifts: dict[str, float] = {}

        def hook(path: str) -> Any:
            def shift(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
                values = output.detach().float().flatten()
                shifts[path] = float(
                    values.kthvalue(max(1, math.ceil(zeros * values.numel()))).values
                )
                return output - shifts[path]

            return shift

        gates = [(p.module, self._model.get_submodule(p.module)) for p in self._gates]
        handles = [module.register_forward_hook(hook(path)) for path, module in gates]
        rows = max(1, _SHIFT_TOKENS // ids.shape[1])
        try:
            _run(self._model, ids[:rows])
        finally:
            for handle in handles:
                handle.remove()
        for path, module in gates:
            self._before[path] = module.bias.data
            module.bias.data = module.bias.data - shifts[path]

    def _norms_before_projections(self) -> tuple[str, ...]:
        """Names, within a block, of the norms whose output the projections read, found by running two tokens."""
        path, blocks = decoder_blocks(self._model)
        norms = {
            f"{path}.{i}.{name}": m
            for i, block in enumerate(blocks)
            for name, m in block.named_modules()
            if "norm" in type(m).__name__.lower()
        }
        readers = {p.module: p for p in find_projections(self._model) if p.kind in _OUTER}
        made: dict[int, tuple[str, torch.Tensor]] = {}
        read: dict[str, int] = {}

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
                made[output.data_ptr()] = name, output

            return hook

        def look(name: str) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                read[name] = args[0].data_ptr()

            return hook

        handles = [m.register_forward_hook(note(name)) for name, m in norms.items()]
        handles += [
            self._model.get_submodule(name).register_forward_pre_hook(look(name))
            for name in readers
        ]
        try:
            _run(self._model, torch.zeros(1, 2, dtype=torch.int64))
        finally:
            for handle in handles:
                handle.remove()
        found: dict[int, set[str]] = {i: set() for i in range(len(blocks))}
        for name, p in readers.items():
            if read.get(name) not in made:
                raise ModelError(
                    f"{name} does not read a norm's output: {self._name} models have no stage2, use stage1"
                )
            norm = made[read[name]][0]
            found[p.block].add(norm.removeprefix(f"{path}.{p.block}."))
        if any(names != found[0] for names in found.values()) or not found[0]:
            raise ModelError(
                f"the blocks of this {self._name} model differ in their norms: use stage1"
            )
        return tuple(sorted(found[0]))


def _activations(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, module, attribute) of every activation inside the blocks."""
    path, blocks = decoder_blocks(model)
    for name, module in blocks.named_modules():
        place = next((p for p in _PLACES if isinstance(getattr(module, p, None), nn.Module)), None)
        if place is not None:
            yield f"{path}.{name}", module, place


def _run(model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model.get_decoder()(input_ids=ids.to(input_device(model)), use_cache=False)
