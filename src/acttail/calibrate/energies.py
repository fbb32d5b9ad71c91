"""The maths of the curves: what a projection's output loses when its smallest inputs are dropped.

No product with W is needed per grid point: g · WΔx = (Wᵀg) · Δx, so one sort of |x| and a cumulative sum
over the sorted products give ½ (g · WΔx)² at every sparsity at once. Tensors in, tensors out.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from acttail.calibrate.curves import Array
from acttail.maths.budget import kept_entries
from acttail.sparse.backends import cpu, reference


def topk_energies(
    x: torch.Tensor, vectors: Sequence[torch.Tensor], dropped: torch.Tensor
) -> torch.Tensor:
    """Half squared partial sums when each row drops its own smallest entries.

    Args:
        x: [rows, d_in] float32.
        vectors: n tensors [rows, d_in] float32.
        dropped: [G] int64, ascending: how many entries each point drops.

    Returns:
        [n, G] float64, summed over rows.
    """
    if cpu.supports(x):
        return cpu.partial_energies(x, list(vectors), dropped)
    return reference.partial_energies(x, vectors, dropped)


def threshold_energies(
    x: torch.Tensor, vectors: Sequence[torch.Tensor], dropped: torch.Tensor
) -> torch.Tensor:
    """Half squared partial sums when one magnitude decides for all rows.

    The thresholds are the rows' own quantiles, so that every point has its sparsity exactly.

    Args:
        x: [rows, d_in] float32.
        vectors: n tensors [rows, d_in] float32.
        dropped: [G] int64, ascending: how many entries each point drops, as a mean over rows.

    Returns:
        [n, G] float64, summed over rows.
    """
    magnitudes = x.abs()
    ranks = (dropped.double() / x.shape[-1] * x.numel()).round().long().clamp(0, x.numel() - 1)
    edges = magnitudes.flatten().sort().values[ranks.to(x.device)]
    # An entry belongs to the first grid point whose threshold it does not reach.
    place = torch.bucketize(magnitudes, edges, right=True)
    sums = []
    for v in vectors:
        parts = torch.zeros(x.shape[0], len(edges) + 1, device=x.device)
        parts.scatter_add_(1, place, x * v)
        partial = parts.cumsum(1)[:, : len(edges)]
        sums.append(0.5 * partial.double().square().sum(0))
    return torch.stack(sums).cpu()


# How entries are dropped while the curves are taken.
SELECTIONS = {"topk": topk_energies, "threshold": threshold_energies}


class EnergySums:
    """Sums of F over tokens, one row of the grid per projection.

    Args:
        d_in: projection name -> input features.
        grid: [G] sparsities.
        selection: a name of :data:`SELECTIONS`.
    """

    def __init__(self, d_in: Mapping[str, int], grid: Array, selection: str) -> None:
        self._asked = d_in, grid, selection
        self._energies = SELECTIONS[selection]
        self.sums = {name: torch.zeros(len(grid), dtype=torch.float64) for name in d_in}
        # What the sums are relative to, where a loss is relative.
        self.scale = dict.fromkeys(d_in, 0.0)
        # How many of the smallest entries each grid point drops.
        self._dropped = {
            d: torch.tensor([d - kept_entries(s, d) for s in grid]) for d in set(d_in.values())
        }

    def empty(self) -> "EnergySums":
        """Sums of the same kind of nothing yet."""
        return EnergySums(*self._asked)

    def merge(self, part: "EnergySums") -> None:
        """Add the sums of further tokens."""
        for name, row in part.sums.items():
            self.sums[name] += row
            self.scale[name] += part.scale[name]

    def dropped(self, d_in: int) -> torch.Tensor:
        """[G] int64: entries dropped at each grid point."""
        return self._dropped[d_in]

    def add(self, seen: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add projections (x, Wᵀg), both [rows, d_in]; those that read the same x share its sort."""
        groups: dict[tuple[int, torch.Size], list[str]] = defaultdict(list)
        for name, (x, _) in seen.items():
            groups[x.data_ptr(), x.shape].append(name)
        for names in groups.values():
            x = seen[names[0]][0].float()
            vectors = [seen[name][1].float() for name in names]
            sums = self._energies(x, vectors, self._dropped[x.shape[-1]])
            for name, row in zip(names, sums, strict=True):
                self.sums[name] += row
