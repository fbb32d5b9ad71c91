"""The solver: any shapes, scales and targets; every s in [0, 0.99], S within 1e-3."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acttail.errors import BudgetError
from acttail.maths.budget import check_target, kept_entries, model_sparsity, solve, solve_offsets

problems = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(-50, 50), min_size=n, max_size=n),
        st.lists(st.floats(1, 1e9), min_size=n, max_size=n),
        st.floats(0, 0.99),
    )
)


@given(problems)
def test_offsets_meet_the_budget(problem):
    offsets, costs, target = problem
    s = solve_offsets(offsets, costs, target)
    assert (s >= 0).all()
    assert (s <= 0.99).all()
    assert model_sparsity(s, costs) == pytest.approx(target, abs=1e-9)


@given(problems)
def test_order_of_offsets_is_kept(problem):
    offsets, costs, target = problem
    s = solve_offsets(offsets, costs, target)
    order = np.argsort(offsets, kind="stable")
    assert (np.diff(s[order]) >= -1e-12).all()


def test_unclipped_interior_is_a_plain_shift():
    s = solve_offsets([-0.1, 0.0, 0.1], [1, 1, 1], 0.5)
    np.testing.assert_allclose(s, [0.4, 0.5, 0.6])


@pytest.mark.parametrize("target", [1.2, -0.1, float("nan"), float("inf"), 0.995])
def test_targets_out_of_range(target):
    with pytest.raises(BudgetError, match="sparsity must be a number"):
        check_target(target)
    with pytest.raises(BudgetError, match="sparsity must be a number"):
        solve_offsets([0.0], [1.0], target)


def test_offsets_must_be_finite():
    with pytest.raises(BudgetError, match="not finite"):
        solve_offsets([0.0, float("nan")], [1.0, 1.0], 0.5)


def test_out_of_reach_says_what_is_in_reach():
    with pytest.raises(BudgetError, match=r"0\.1000 to 0\.2000"):
        solve(lambda c: np.array([c]), [1.0], 0.5, (0.1, 0.2))


def test_a_jump_in_the_family_is_mixed_across():
    s = solve(lambda c: np.array([0.0 if c < 0.3 else 0.9]), [1.0], 0.5, (0.0, 1.0))
    assert s[0] == pytest.approx(0.5)


@given(st.floats(0, 0.99), st.integers(1, 20000))
def test_kept_entries(s, d):
    k = kept_entries(s, d)
    assert 1 <= k <= d
    assert abs((1 - k / d) - s) <= 0.5 / d + 1e-12 or k == 1


def test_kept_entries_rounds_half_up():
    assert kept_entries(0.5, 5) == 3
    assert kept_entries(0.99, 10) == 1
    assert kept_entries(0.0, 7) == 7
