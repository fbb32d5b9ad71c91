"""Numerical check of the sparsity-alpha relation, and the figure of docs/theory.md.

Plants spectra lambda_k ~ k^(-1/(alpha-1)) in random matrices, keeps the density the relation gives,
and measures the energy that is lost. Appends to relation_check.csv and writes docs/images/relation.svg.

    python benchmarks/relation_check.py
"""

import matplotlib as mpl
import numpy as np
from common import HERE, On, Rows, options

from acttail.maths.relation import rank_exponent, sparsity_asymptotic, sparsity_finite

mpl.use("Agg")
import matplotlib.pyplot as plt

SIZE, TAUS = 256, (0.05, 0.2, 0.5)


def lost_energy(alpha: float, tau: float, seed: int) -> float:
    """Energy dropped with the relation's density in a matrix with a planted spectrum."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    right = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    singular = np.arange(1, SIZE + 1) ** (-rank_exponent(alpha) / 2)
    energies = np.linalg.svd(left @ np.diag(singular) @ right, compute_uv=False) ** 2
    density = 1 - sparsity_finite(alpha, tau, SIZE)
    ranks = np.concatenate([[0.0], np.cumsum(energies)]) / energies.sum()
    return 1 - float(np.interp(density * SIZE, np.arange(SIZE + 1), ranks))


def main():
    args = options(__doc__).parse_args()
    rows = Rows("relation_check", args.out)
    alphas = np.linspace(1.2, 6, 97)
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 10, "svg.hashsalt": "acttail"})
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for tau, colour in zip(TAUS, ("#0b6bcb", "#c2410c", "#15803d"), strict=True):
        finite = [sparsity_finite(a, tau, SIZE) for a in alphas]
        axes.plot(alphas, finite, color=colour, label=f"finite, N = {SIZE}, τ = {tau}")
        heavy = alphas[alphas > 2.05]
        axes.plot(heavy, [sparsity_asymptotic(a, tau) for a in heavy], color=colour, ls="--", lw=1)
        for alpha in (1.5, 2.0, 2.5, 3.5, 5.0):
            lost = lost_energy(alpha, tau, seed=0)
            s = sparsity_finite(alpha, tau, SIZE)
            axes.plot(alpha, s, "o", color=colour, ms=4)
            rows.append({
                "alpha": alpha, "tau": tau, "size": SIZE, "sparsity": round(s, 6),
                "lost_energy": round(lost, 8),
                "asymptotic": round(sparsity_asymptotic(alpha, tau), 6) if alpha > 2 else "",
            }, On())  # fmt: skip
    axes.plot([], [], color="0.4", ls="--", lw=1, label="asymptotic, N → ∞ (α > 2)")
    axes.plot([], [], "o", color="0.4", ms=4, label="planted matrices, energy lost = τ")
    axes.set(xlabel="α", ylabel="sparsity s(α, τ)", ylim=(0, 1), xlim=(1.2, 6))
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    folder = HERE.parent / "docs" / "images" if args.out == HERE else args.out
    figure.savefig(folder / "relation.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
