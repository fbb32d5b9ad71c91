"""From which density on the dense kernel is taken."""

import pytest

from acttail.allocate import make_plan
from acttail.engine import Engine, tune
from acttail.engine.shapes import shape_for
from acttail.sparse.backends import abi


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


@pytest.mark.parametrize(
    ("ratios", "vectors"),
    [
        ({2: 0.9, 4: 0.8, 8: 0.7}, 2),
        ({2: 1.2, 4: 0.9, 8: 0.7}, 4),
        ({2: 0.8, 4: 1.1, 8: 0.7}, 8),  # a lucky round
        ({2: 0.8, 4: 0.7, 8: 1.1}, abi.NEVER),
        ({2: 0.99, 4: 0.99, 8: 0.99}, abi.NEVER),  # noise
    ],
)
def test_rows_are_read_once_from_where_it_always_wins(ratios, vectors):
    assert tune.joining(ratios) == vectors


def test_what_was_measured_is_kept_and_told_to_the_engine(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.setenv("ACTTAIL_CACHE", str(tmp_path))
    engine = Engine.from_pretrained(tiny_folder, dtype="int8", threads=1)
    layout = engine.packed.layout
    assert tune.read_together(layout) == {}
    found = tune.tune([layout.shapes[name] for name in layout.segments])
    told = tune.read_together(layout)
    assert told.keys() == layout.segments.keys()
    by_shape = {c.shape: c for c in found}
    for name, vectors in told.items():
        c = by_shape[layout.shapes[name]]
        assert vectors == c.together == tune.joining(c.shared)
        assert c.shared.keys() == {2, 4, 8}
        assert all(r > 0 for r in c.shared.values())


def test_where_nothing_was_measured_the_format_says_when_the_dense_kernel_is_taken(llama):
    """No plan is slower than none: of rows that hardly any input drops, lists cost more than they save."""
    plan = make_plan(llama, 0.3)
    density = {n: 1 - e.realised_sparsity for n, e in plan.projections.items()}
    for dtype, group in (
        ("fp32", None),
        ("bf16", None),
        ("int8", None),
        ("int4", None),
        ("int4", 32),
    ):
        engine = Engine.from_model(llama, plan, dtype=dtype, group=group, native=True)
        layout = engine.packed.layout
        limit = {
            s.name: layout.shapes[n].dense_from
            for n, segments in layout.segments.items()
            for s in segments
        }
        expected = {n for n, d in density.items() if limit[n] < 1 and d >= limit[n]}
        assert engine.decoder.dense_kernel == expected
        assert bool(expected) == (dtype not in ("fp32", "bf16"))
    assert shape_for("int8", 576, 1536).dense_from < shape_for("int8", 576, 8192).dense_from < 1
