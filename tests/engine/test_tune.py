"""From which density on the dense kernel is taken."""

import pytest

from acttail.engine import tune


@pytest.mark.parametrize(
    ("ratios", "density"),
    [
        ({1.0: 1.4, 0.9: 0.9, 0.5: 0.6}, 1.0),  # a list of all rows is never made
        ({1.0: 1.5, 0.9: 1.5, 0.8: 1.4, 0.7: 1.2, 0.6: 0.9, 0.5: 0.8}, 0.7),
        ({0.9: 1.3, 0.8: 1.0, 0.7: 1.2, 0.6: 0.9}, 0.7),  # a lucky round in between
        ({0.9: 0.8, 0.8: 0.7, 0.7: 0.6, 0.35: 1.1, 0.2: 0.4}, 1.0),  # an unlucky one
        ({0.9: 1.01, 0.8: 1.01}, 1.0),  # noise
    ],
)
def test_crossing_is_where_the_whole_costs_least(ratios, density):
    assert tune.crossing(ratios) == density
