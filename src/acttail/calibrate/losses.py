"""The losses whose curves can be measured: how one window of text adds to the sums."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from acttail.calibrate.energies import EnergySums
from acttail.calibrate.probe import probing
from acttail.calibrate.tape import BlockTape, backward_by_block, fisher_objective
from acttail.maths.losses import divergence
from acttail.model.projections import find_all
from acttail.model.weights import LoadedWeights
from acttail.sparse.ops import topk_mask

# Rows of random vectors made at once.
_ROWS = 256

# (model, ids [1, window], generator, sums)
Step = Callable[[Any, torch.Tensor, torch.Generator, EnergySums], None]

# Denser towards 1, where the curves bend most.
GRID = (
    *(round(0.05 * i, 2) for i in range(19)), 0.925, 0.95, 0.965, 0.98, 0.99,
)  # fmt: skip
# One forward pass per projection and point: 7 points where 24 would take an hour for 512 tokens.
KL_GRID = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)


@dataclass(frozen=True)
class Loss:
    """A loss of which curves can be taken.

    Attributes:
        name: as given to `measure` and to the allocator's argument ``loss``.
        step: adds one window's part to the sums.
        grid: sparsities at which the curves are taken by default.
        selections: how entries may be dropped while they are.
    """

    name: str
    step: Step
    grid: tuple[float, ...] = GRID
    selections: tuple[str, ...] = ("topk", "threshold")


def _fisher_step(
    model: Any, ids: torch.Tensor, generator: torch.Generator, sums: EnergySums
) -> None:
    backward_by_block(model, ids, fisher_objective(generator), lambda _, seen: sums.add(seen))


def _output_step(
    model: Any, ids: torch.Tensor, generator: torch.Generator, sums: EnergySums
) -> None:
    """A random g ~ N(0, I) makes E[(g·WΔx)²] = |WΔx|², so the same machinery gives output errors."""
    weights = LoadedWeights(model)
    by_name = {p.name: p for p in find_all(model)}

    def part(rows: int, weight: torch.Tensor) -> torch.Tensor:
        g = torch.randn(rows, weight.shape[0], generator=generator, device=weight.device)
        return g.to(weight.dtype) @ weight

    def probe(name: str, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight = weights.weight(by_name[name])
        # [rows, d_in], Wᵀg; a few rows at a time, for the head has as many outputs as there are tokens.
        v = torch.cat([part(len(rows), weight) for rows in torch.split(flat, _ROWS)]).to(flat.dtype)
        sums.add({name: (flat, v)})
        sums.scale[name] += 0.5 * float((flat * v).float().sum(-1).double().square().sum())
        return x

    with torch.no_grad(), probing(model, probe, head=True):
        model(input_ids=ids, use_cache=False)


def _kl_step(model: Any, ids: torch.Tensor, generator: torch.Generator, sums: EnergySums) -> None:
    """KL(dense || one projection sparse), summed over positions; a pass starts at that block."""
    projections = find_all(model)
    chosen: dict[str, int] = {}

    def probe(name: str, x: torch.Tensor) -> torch.Tensor:
        return topk_mask(x, chosen[name]) if name in chosen else x

    tape = BlockTape(model)
    with probing(model, probe, head=True):
        with tape, torch.no_grad():
            dense = model(input_ids=ids, use_cache=False).logits.flatten(0, -2).detach()
        for p in projections:
            with tape.starting_at(p.block), torch.no_grad():
                for point, dropped in enumerate(sums.dropped(p.d_in).tolist()):
                    if dropped:
                        chosen.update({p.name: p.d_in - dropped})
                        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, -2)
                        kl, _ = divergence(dense, logits)
                        sums.sums[p.name][point] += float(kl.double().sum())
            chosen.clear()


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("fisher", _fisher_step),
        Loss("output", _output_step),
        Loss("kl", _kl_step, KL_GRID, ("topk",)),
    )
}
