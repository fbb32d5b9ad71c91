"""The explicit relation: formula, limits, and a numerical check on planted spectra."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acttail.maths.relation import (
    cumulative_energy,
    density_for_energy,
    energy_shares,
    rank_exponent,
    reflect,
    sparsity_asymptotic,
    sparsity_finite,
)


@given(st.floats(2.5, 8), st.floats(0.01, 0.9))
def test_finite_approaches_asymptotic(alpha, tau):
    assert sparsity_finite(alpha, tau, 200_000) == pytest.approx(
        sparsity_asymptotic(alpha, tau), abs=0.02
    )


@given(st.floats(1.05, 8), st.floats(0.0, 1.0), st.integers(2, 500))
def test_kept_energy_is_what_was_asked(alpha, tau, size):
    shares = cumulative_energy(alpha, size)
    density = density_for_energy(shares, 1 - tau)
    assert 0 <= density <= 1
    # The density's (interpolated) energy is 1 - tau.
    assert np.interp(density * size, np.arange(size + 1), shares) == pytest.approx(
        1 - tau, abs=1e-9
    )


@given(st.floats(1.1, 6), st.floats(0.02, 3), st.floats(0.01, 0.9))
def test_heavier_tail_is_sparser(alpha, step, tau):
    assert sparsity_finite(alpha, tau, 300) >= sparsity_finite(alpha + step, tau, 300) - 1e-12


def test_planted_spectrum_holds_the_energy_the_relation_says():
    """Matrices with lambda_k ~ k^-p: dropping all but the top q directions leaves exactly tau."""
    rng = np.random.default_rng(0)
    for alpha in (1.5, 2.5, 3.5):
        size = 200
        eigenvalues = np.arange(1, size + 1) ** -rank_exponent(alpha)
        left = np.linalg.qr(rng.standard_normal((size, size)))[0]
        right = np.linalg.qr(rng.standard_normal((size, size)))[0]
        singular = np.linalg.svd(left @ np.diag(np.sqrt(eigenvalues)) @ right, compute_uv=False)
        for tau in (0.05, 0.3):
            kept = round((1 - sparsity_finite(alpha, tau, size)) * size)
            lost = (singular[kept:] ** 2).sum() / (singular**2).sum()
            step = singular[max(kept - 1, 0)] ** 2 / (singular**2).sum()
            assert abs(lost - tau) <= step


def test_domain():
    with pytest.raises(ValueError, match="alpha > 1"):
        rank_exponent(1.0)
    with pytest.raises(ValueError, match="alpha > 2"):
        sparsity_asymptotic(2.0, 0.1)
    with pytest.raises(ValueError, match="no energy"):
        energy_shares(np.zeros(4))


def test_rank_deficient_spectrum_needs_no_more_than_its_rank():
    shares = energy_shares([4.0, 4.0, 0.0, 0.0])
    assert density_for_energy(shares, 1.0) == 0.5
    assert density_for_energy(shares, 0.5) == 0.25


def test_reflect():
    values = np.array([1.5, 2.0, 2.5, 6.0])
    reflected = reflect(values)
    assert reflected[1] == pytest.approx(2 * 3.0 - 2.0)
    assert reflected.min() > 1.5
    assert (np.argsort(reflected) == np.argsort(-values)).all()
