"""Estimators: planted exponents come back, known libraries agree, degenerate spectra are flagged."""

import math
import warnings

import numpy as np
import pytest
import torch

from acttail.errors import SpectrumError
from acttail.spectrum.esd import esd, farms_esd, farms_windows
from acttail.spectrum.tail import ESTIMATORS, fit_farms, fit_hill, fit_ks, fit_peak


def planted(alpha: float, size: int, seed: int) -> torch.Tensor:
    """Eigenvalues drawn from a pure power law of density lambda^(-alpha), lambda >= 1."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)
    return (1 - uniform) ** (-1 / (alpha - 1))


def planted_matrix(eigenvalues: torch.Tensor, d_in: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = eigenvalues.numel()
    left = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(d_in, n, generator=generator, dtype=torch.float64)).Q
    return left @ torch.diag(eigenvalues.sqrt()) @ right.T


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
@pytest.mark.parametrize("estimator", ["hill", "ks"])
def test_planted_exponent_is_recovered(estimator, alpha):
    fits = [ESTIMATORS[estimator](planted(alpha, 1000, seed)) for seed in range(100)]
    within = sum(abs(f.alpha - alpha) <= 2 * f.stderr for f in fits)
    assert within >= 90


def test_planted_matrix_end_to_end():
    values = planted(2.5, 200, 3)
    weight = planted_matrix(values, 300)
    torch.testing.assert_close(esd(weight), values.sort().values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(esd(weight.T), values.sort().values, rtol=1e-9, atol=1e-9)
    assert fit_hill(esd(weight)).alpha == pytest.approx(fit_hill(values).alpha)


def test_hill_is_the_formula():
    values = planted(3.0, 101, 0).sort().values
    tail = values[50:].numpy()
    expected = 1 + len(tail) / np.log(tail / tail[0]).sum()
    fit = fit_hill(values)
    assert fit.alpha == pytest.approx(expected)
    assert fit.tail_size == 51
    assert fit.xmin == pytest.approx(tail[0])
    assert fit.stderr == pytest.approx((expected - 1) / math.sqrt(51))


@pytest.mark.parametrize("seed", range(5))
def test_ks_agrees_with_powerlaw_and_weightwatcher(seed):
    """WeightWatcher fits by powerlaw 1.5 or its own copy of it; both must give our numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import powerlaw
        from weightwatcher.WW_powerlaw import WWFit

        values = torch.cat([planted(2.7, 300, seed), torch.rand(100, dtype=torch.float64)])
        fits = [powerlaw.Fit(values.numpy(), verbose=False), WWFit(values.numpy())]
    ours = fit_ks(values)
    for theirs in fits:
        assert ours.xmin == pytest.approx(theirs.xmin)
        assert ours.alpha == pytest.approx(theirs.alpha)
        assert ours.ks_distance == pytest.approx(theirs.D)


def test_gaussian_has_no_heavy_tail():
    """A Marchenko-Pastur bulk is compact: every estimator flags it."""
    torch.manual_seed(0)
    values = esd(torch.randn(400, 600))
    for name, fit in ESTIMATORS.items():
        found = fit(values)
        assert found.alpha is not None, name
        assert math.isfinite(found.alpha), name
        assert found.flag is not None, name


def test_zero_matrix_is_flagged():
    for fit in ESTIMATORS.values():
        found = fit(esd(torch.zeros(8, 12)))
        assert found.alpha is None
        assert "zero matrix" in found.flag


def test_rank_deficient_is_flagged_and_finite():
    torch.manual_seed(0)
    weight = torch.randn(60, 20, dtype=torch.float64) @ torch.randn(20, 80, dtype=torch.float64)
    for fit in (fit_hill, fit_ks, fit_peak):
        found = fit(esd(weight))
        assert "rank 20 of 60" in found.flag
        assert math.isfinite(found.alpha)


def test_flat_and_tiny_spectra_are_flagged():
    for fit in ESTIMATORS.values():
        assert "flat" in fit(torch.ones(50)).flag
        assert "too few" in fit(torch.tensor([1.0, 2.0])).flag


def test_flat_tail_is_flagged():
    values = torch.cat([torch.linspace(0.1, 0.9, 50), torch.ones(50)])
    assert "flat" in fit_hill(values).flag


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_raise(bad):
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(SpectrumError, match="NaN or infinite"):
        esd(weight)
    with pytest.raises(SpectrumError, match="NaN or infinite"):
        fit_hill(torch.tensor([1.0, bad, 2.0, 3.0]))


@pytest.mark.parametrize("shape", [(5,), (0, 3), (2, 2, 2)])
def test_not_a_matrix(shape):
    with pytest.raises(SpectrumError, match="non-empty matrix"):
        esd(torch.zeros(shape))


def test_peak_keeps_xmin_near_the_fullest_bin():
    values = planted(3.0, 1000, 0)
    logs = torch.log10(values)
    counts = torch.histc(logs, 100, float(logs.min()), float(logs.max()))
    peak = 10 ** (float(logs.min()) + int(counts.argmax()) * float(logs.max() - logs.min()) / 100)
    assert 0.95 * peak <= fit_peak(values).xmin <= 1.5 * peak


def test_farms_windows_cover_the_long_side():
    assert farms_windows(10, 10) == [(0, 10, False)]
    assert farms_windows(10, 30) == [(0, 10, False), (10, 10, False), (20, 10, False)]
    assert farms_windows(25, 10) == [(0, 10, True), (15, 10, True)]
    weight = torch.randn(10, 30)
    pooled = torch.cat([esd(weight[:, i : i + 10]) for i in (0, 10, 20)]).sort().values
    torch.testing.assert_close(farms_esd(weight), pooled)
    assert fit_farms(pooled).stderr is None


def test_farms_of_a_square_is_hill():
    values = esd(torch.randn(40, 40))
    assert fit_farms(farms_esd(torch.eye(4))).alpha is None
    assert fit_farms(values).alpha == fit_hill(values).alpha


def test_chunked_candidates_equal_one_table(monkeypatch):
    import acttail.spectrum.tail

    values = planted(2.2, 500, 1)
    whole = fit_ks(values)
    monkeypatch.setattr(acttail.spectrum.tail, "_CANDIDATE_ROWS", 7)
    assert fit_ks(values) == whole
