"""`greedy`: block-wise greedy on the block's output error, after TEAL (Liu et al. 2024, arXiv 2408.14690).

Every block gets the model's sparsity; inside a block, the projection whose next step raises the error
of the block's output least per weight dropped is made sparser, until the target is met.

Where this departs from the original, and why:

- TopK instead of thresholds while searching, as everywhere in acttail.
- Weights of every projection as they are; the original assumes q, k, v and o of one size, which is wrong
  for grouped-query models.
- A step raises one projection by at most 0.05, and steps are compared by error per weight dropped: the
  original's equal steps in block sparsity move a narrow k by 0.6 at once.
- Stale errors are re-measured only for the most promising projection (lazy greedy, Minoux 1978): 2
  block passes a step instead of 7.
- One path per block serves every target.
"""

import heapq
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from acttail.allocate.base import Allocation, Allocator, Needs
from acttail.allocate.context import AllocationContext, Array, calibration_of
from acttail.base.files import cache_dir, write_json
from acttail.base.schema import read_kept
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.probe import probing
from acttail.calibrate.tape import BlockTape
from acttail.errors import ActTailError
from acttail.maths.budget import HIGHEST, kept_entries
from acttail.model.projections import Projection, find_projections
from acttail.model.weights import input_device
from acttail.sparse.ops import topk_mask

_STEP = 0.05


@dataclass(frozen=True)
class BlockPath:
    """The order in which one block's projections become sparser.

    Attributes:
        names: [n] projections of the block.
        states: sparsities [n] after each step, from all 0 to all at the highest.
    """

    names: list[str]
    states: list[list[float]]

    def at(self, sparsity: float, costs: Array) -> Array:
        """[n] sparsities at the given block sparsity, between two steps by interpolation."""
        states = np.array(self.states)  # [steps, n]
        reached = states @ costs / costs.sum()
        return np.array([np.interp(sparsity, reached, column) for column in states.T])


def _block_path(
    tape: BlockTape, index: int, projections: list[Projection], ks: dict[str, int]
) -> BlockPath:
    """Greedy path of one block; `ks` is what the probe reads while the block is run."""
    d_in = {p.name: p.d_in for p in projections}
    cost = {p.name: max(p.cost, 1e-9) for p in projections}
    names = list(d_in)
    level = dict.fromkeys(names, 0.0)

    def output(levels: Mapping[str, float]) -> torch.Tensor:
        ks.update({n: kept_entries(s, d_in[n]) for n, s in levels.items()})
        with torch.no_grad():
            return tape.replay(index)[1].float()

    target = output(level)

    def error(levels: Mapping[str, float]) -> float:
        return float((output(levels) - target).square().sum())

    def raised(name: str) -> float:
        return min(round(level[name] + _STEP, 6), HIGHEST)

    def rise(name: str) -> float:
        """Rise of the error per weight dropped, if this projection takes its next step."""
        dropped = cost[name] * (raised(name) - level[name])
        return (error({**level, name: raised(name)}) - current) / dropped

    current = 0.0
    states = [[0.0] * len(names)]
    # (rise, step at which it was measured, name): an entry measured at this very step is exact.
    heap = [(rise(name), 0, name) for name in names]
    heapq.heapify(heap)
    while heap:
        _, measured, name = heapq.heappop(heap)
        step = len(states) - 1
        if measured != step:
            heapq.heappush(heap, (rise(name), step, name))
            continue
        level[name] = raised(name)
        current = error(level)
        states.append([level[n] for n in names])
        if level[name] < HIGHEST:
            heapq.heappush(heap, (rise(name), step, name))
    ks.update({n: d_in[n] for n in names})
    return BlockPath(names, states)


def paths(calibration: Calibration, tokens: int) -> list[BlockPath]:
    """The greedy path of every block, from the dense model's hidden states.

    Each block's path is kept in the cache as soon as it is found, so that a run that was stopped goes
    on with the next block.

    Args:
        calibration: model and text.
        tokens: how many calibration tokens the block errors are measured on.

    Returns:
        One path per block.
    """
    model = calibration.model
    by_block: dict[int, list[Projection]] = {}
    for p in find_projections(model):
        by_block.setdefault(p.block, []).append(p)
    ids = calibration.batches()[:1, :tokens].to(input_device(model))
    folder = cache_dir() / "greedy" / calibration.key("greedy", tokens, _STEP, ids=ids)
    ks: dict[str, int] = {}

    def probe(name: str, x: torch.Tensor) -> torch.Tensor:
        k = ks.get(name, x.shape[-1])
        return x if k == x.shape[-1] else topk_mask(x, k)

    found = []
    tape = BlockTape(model)
    with probing(model, probe):
        with tape, torch.no_grad():
            model(input_ids=ids, use_cache=False)
        for index, projections in sorted(by_block.items()):
            file = folder / f"{index}.json"
            path = read_kept(file, BlockPath)
            if path is None or path.names != [p.name for p in projections]:
                path = _block_path(tape, index, projections, ks)
                with suppress(OSError, ActTailError):
                    folder.mkdir(parents=True, exist_ok=True)
                    write_json(file, asdict(path))
            found.append(path)
            if calibration.progress is not None:
                calibration.progress(index + 1, len(by_block))
    return found


def allocate(
    context: AllocationContext, sparsity: float, arguments: Mapping[str, Any]
) -> Allocation:
    """Every block at the target, shared out along its greedy path.

    Raises:
        TextError: no calibration text was given.
    """
    calibration = calibration_of(context)
    tokens = arguments["tokens"]
    found = calibration.once(lambda: paths(calibration, tokens), "greedy", tokens)
    solved: dict[str, float] = {}
    cost = dict(zip((p.name for p in context.projections), context.costs, strict=True))
    for path in found:
        values = path.at(sparsity, np.array([cost[n] for n in path.names]))
        solved.update(zip(path.names, map(float, values), strict=True))
    return Allocation(np.array([solved[p.name] for p in context.projections]))


GREEDY = Allocator(
    "greedy", "calibrated: TEAL's block-wise greedy on the block's output error", {"tokens": 512},
    allocate, needs=Needs.TEXT, head=False,
)  # fmt: skip
