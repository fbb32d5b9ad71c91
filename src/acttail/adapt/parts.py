"""What of a model is trained: one row per name, and what it puts into the model and takes out again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from acttail.adapt.biases import add_biases, remove_biases
from acttail.adapt.lora import Adapters
from acttail.errors import ActTailError, ModelError
from acttail.model.projections import decoder_blocks, find_projections
from acttail.plan import SparsityPlan
from acttail.sparse.rules import kind_of

Parameters = dict[str, nn.Parameter]


class Part:
    """Parameters under training.

    Attributes:
        parameters: name -> parameter, of the model as it is while it is trained.
        rate: learning rate.
    """

    def __init__(self, parameters: Parameters, rate: float) -> None:
        self.parameters, self.rate = parameters, rate
        self._before = {name: p.detach().clone() for name, p in parameters.items()}

    @contextmanager
    def before(self) -> Iterator[None]:
        """Inside, the model computes with what the parameters were before the training."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, p in self.parameters.items():
            p.data, self._before[name] = self._before[name], p.data

    def merge(self) -> None:
        """Leave what was learnt in ordinary parameters of the model."""

    def undo(self) -> None:
        """Make the model what it was, merged or not."""
        for name, p in self.parameters.items():
            p.data = self._before[name]


class BiasPart(Part):
    """Biases of the projections, new ones where the model had none."""

    def __init__(self, model: Any, rate: float) -> None:
        self._model = model
        self._added = add_biases(model)
        found = {
            f"{p.module}.bias": bias
            for p in find_projections(model)
            if isinstance(
                bias := getattr(model.get_submodule(p.module), "bias", None), nn.Parameter
            )
        }
        super().__init__(found, rate)

    def undo(self) -> None:
        """See :meth:`Part.undo`."""
        super().undo()
        remove_biases(self._model, self._added)


class LoraPart(Part):
    """Low-rank adapters of peft beside every projection of the blocks."""

    def __init__(self, model: Any, rate: float, rank: int, seed: int) -> None:
        self._adapters = Adapters(model, rank, seed)
        super().__init__(self._adapters.parameters, rate)

    @contextmanager
    def before(self) -> Iterator[None]:
        """See :meth:`Part.before`; without the adapters the products with them are spared."""
        with self._adapters.off():
            yield

    def merge(self) -> None:
        """See :meth:`Part.merge`."""
        self._adapters.merge()

    def undo(self) -> None:
        """See :meth:`Part.undo`."""
        self._adapters.undo()


def _norms(model: nn.Module) -> Parameters:
    """Weights (and biases) of every norm from the first block on."""
    path, _ = decoder_blocks(model)
    root = path.rpartition(".")[0]
    return {
        f"{at}.{name}": p
        for at, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and f"{at}.".startswith(f"{root}." if root else "")
        for name, p in module.named_parameters(recurse=False)
    }  # fmt: skip


def _everything(model: nn.Module) -> Parameters:
    """Every parameter of the blocks, and the norms after them; embeddings and head stay."""
    path, _ = decoder_blocks(model)
    inside = {n: p for n, p in model.named_parameters() if n.startswith(f"{path}.")}
    return inside | _norms(model)


@dataclass(frozen=True)
class Attach:
    """What a part may need to know: rank of adapters and the seed of their start."""

    rank: int
    seed: int


@dataclass(frozen=True)
class Kind:
    """One row: a name that `--train` takes.

    Attributes:
        name: of it.
        what: in words.
        attach: (model, learning rate, settings) -> the part.
        rate: learning rate; those of bias and norm are not tuned yet.
        matrices: whether it moves the projections' own matrices; two such kinds would do the same work twice.
        holds: kinds whose parameters it trains already.
        wraps: whether modules are wrapped, so that no rule may look at their outputs.
        package: that it needs beside acttail's own, None for none.
    """

    name: str
    what: str
    attach: Callable[[Any, float, Attach], Part]
    rate: float
    matrices: bool = False
    holds: tuple[str, ...] = ()
    wraps: bool = False
    package: str | None = None


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("bias", "a bias per output of each projection", lambda m, r, s: BiasPart(m, r), 3e-3),
        Kind("norm", "the norms' weights", lambda m, r, s: Part(_norms(m), r), 3e-3),
        Kind(
            "lora", "low-rank changes of the projections, merged afterwards",
            lambda m, r, s: LoraPart(m, r, s.rank, s.seed), 1e-3, matrices=True, wraps=True, package="peft",
        ),
        Kind(
            "all", "every weight of the blocks", lambda m, r, s: Part(_everything(m), r), 1e-4,
            matrices=True, holds=("norm",),
        ),
    )
}  # fmt: skip


def check_parts(names: Sequence[str]) -> None:
    """Refuse what cannot be trained, alone or together.

    Raises:
        ActTailError: an unknown name, none, two that train the same, or a package that is not there.
    """
    if not names:
        raise ActTailError(f"nothing to train: give {', '.join(KINDS)}")
    unknown = next((n for n in names if n not in KINDS), None)
    if unknown is not None:
        raise ActTailError(f"cannot train {unknown!r}: use {', '.join(KINDS)}")
    rows = [KINDS[n] for n in dict.fromkeys(names)]
    movers = [r.name for r in rows if r.matrices]
    held = [(r.name, h) for r in rows for h in r.holds if h in names]
    if len(movers) > 1 or held:
        first, second = (movers[1], movers[0]) if len(movers) > 1 else held[0]
        raise ActTailError(f"{first} trains what {second} does: leave one of them out")
    absent = next((r for r in rows if r.package is not None and find_spec(r.package) is None), None)
    if absent is not None:
        raise ActTailError(
            f"{absent.name} needs {absent.package}: pip install 'acttail[adapt]', or train norm or all"
        )


def check_rule(names: Sequence[str], plan: SparsityPlan) -> None:
    """Refuse what cannot be trained under a plan's rule.

    Raises:
        ActTailError: names the two.
    """
    wrapping = next((n for n in names if KINDS[n].wraps), None)
    if wrapping is not None and kind_of(plan).watch is not None:
        raise ActTailError(
            f"{wrapping} cannot be trained under the rule {plan.rule}, which looks at the projections' own "
            "outputs: train bias, norm or all"
        )


def attach(model: Any, names: Sequence[str], *, rank: int, seed: int) -> list[Part]:
    """Put what is to be trained into a sparse model; nothing else of it asks for a gradient.

    Args:
        model: sparse, see :func:`acttail.sparsify_`; dense weights in float32.
        names: of :data:`KINDS`.
        rank: of adapters.
        seed: of their start.

    Raises:
        ModelError: the model has nothing of the kind; names what it can be trained with.
    """
    model.requires_grad_(False)
    parts: list[Part] = []
    # Wrapping renames what it wraps, so it comes last.
    with ExitStack() as stack:
        stack.callback(undo, parts)
        for name in sorted(dict.fromkeys(names), key=lambda n: KINDS[n].wraps):
            kind = KINDS[name]
            parts.append(kind.attach(model, kind.rate, Attach(rank, seed)))
            if not parts[-1].parameters:
                raise ModelError(f"{type(model).__name__} has nothing that {name} could train")
        stack.pop_all()
    # A parameter that two kinds hold (a bias that was there) is trained once, by the first.
    seen: set[int] = set()
    for part in parts:
        part.parameters = {n: p for n, p in part.parameters.items() if id(p) not in seen}
        seen |= {id(p) for p in part.parameters.values()}
    for part in parts:
        for p in part.parameters.values():
            p.requires_grad_(True)
    return parts


def undo(parts: Sequence[Part]) -> None:
    """Make the model what it was before :func:`attach`."""
    for part in reversed(parts):
        part.undo()


def values(parts: Sequence[Part]) -> dict[str, torch.Tensor]:
    """Name -> value of everything under training, not copied."""
    return {name: p.detach() for part in parts for name, p in part.parameters.items()}
