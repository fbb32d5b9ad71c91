"""The HTML report: its sections, its size, its behaviour in a browser; the terminal's heat map."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest
import torch
from browser import needs_browser, page_of
from typer.testing import CliRunner

import acttail
from acttail.calibrate.curves import SensitivityCurves
from acttail.cli import app
from acttail.errors import ActTailError, PlanError
from acttail.report import Report, render
from acttail.report.charts import line_chart
from acttail.report.density import histogram, points, tail_line
from acttail.report.gather import add_results, report_of
from acttail.report.heatmap import grid, svg, terminal
from acttail.spectrum.tail import ESTIMATORS

ROW = {
    "model": "m", "allocator": None, "rule": None, "sparsity": 0.0, "realised_sparsity": 0.0, "perplexity": 10.0,
    "perplexity_stderr": 0.5, "kl": 0.0, "kl_stderr": 0.0, "top1": 1.0, "text": "t", "window": 64, "scored": 63,
    "windows": 1, "stride": 64, "bos": False, "dtype": "float32", "prefill": "all", "ratio_to_uniform": None,
}  # fmt: skip
SPEED = {
    "model": "m", "dtype": "bf16", "threads": 2, "sparsity": 0.5, "rounds": 7, "prompt_tokens": 128, "new_tokens": 64,
    "tokens_per_second": {"sparse": 20.0, "dense": 10.0},
    "ratios": {"dense": {"median": 2.0, "low": 1.9, "high": 2.1}},
    "bytes_per_token": {"sparse": 1e6, "dense": 2e6}, "bandwidth_share": {"sparse": 0.5, "dense": 0.6},
}  # fmt: skip


def scored(model, folder, arguments):
    """What `acttail eval --tasks` prints of a model, on six items of a real task."""
    items = [
        {"goal": f"to {a}", "sol1": f"use the {b}", "sol2": f"never {b}", "label": i % 2}
        for i, (a, b) in enumerate([("cut", "pie"), ("fix", "car"), ("sew", "hat")] * 2)
    ]
    data = folder / "data" / "piqa"
    data.mkdir(parents=True, exist_ok=True)
    (data / "validation.jsonl").write_text("\n".join(map(json.dumps, items)))
    done = CliRunner().invoke(
        app,
        ["eval", str(model), "--tasks", "piqa", "--task-data", str(data.parent), *arguments, "--json"],
        env={"ACTTAIL_CACHE": str(folder / "cache")},
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def files(tiny_folder, tmp_path_factory):
    """A plan, curves and results of every kind."""
    folder = tmp_path_factory.mktemp("report")
    plan = acttail.make_plan(str(tiny_folder), 0.5)
    plan.save(folder / "plan.json")
    curve = np.array([0.0, 1e-3, 1e-2, 1e-1])
    names = list(plan.projections)
    curves = {n: curve * (i + 1) for i, n in enumerate(names)}
    about = {"loss": "fisher", "text": "made up"}
    SensitivityCurves(np.array([0.0, 0.3, 0.6, 0.9]), curves, about).save(
        folder / "curves.safetensors"
    )
    sparse = ROW | {
        "allocator": "acttail",
        "sparsity": 0.5,
        "realised_sparsity": 0.5,
        "perplexity": 12.0,
        "kl": 0.2,
    }
    (folder / "compare.json").write_text(json.dumps([ROW, sparse]))
    for name, arguments in (
        ("tasks", ["--plan", str(folder / "plan.json")]),
        ("dense-tasks", []),
    ):
        (folder / f"{name}.json").write_text(scored(tiny_folder, folder, arguments))
    (folder / "bench.json").write_text(json.dumps(SPEED))
    (folder / "sweep.csv").write_text(
        "allocator,sparsity,realised_sparsity,perplexity\nuniform,0.5,0.5,13\n"
    )
    return folder


@pytest.fixture(scope="module")
def page_file(files, tiny_folder):
    names = ("compare.json", "tasks.json", "dense-tasks.json", "bench.json", "sweep.csv")
    results = [str(files / n) for n in names]
    report = report_of(
        str(tiny_folder), plans=[str(files / "plan.json")], results=results,
        curves=str(files / "curves.safetensors"),
    )  # fmt: skip
    path = files / "page.html"
    path.write_text(render(report), encoding="utf-8")
    return path


def test_histogram_is_a_density():
    values = torch.rand(500, dtype=torch.float64).sort().values + 0.01
    found = histogram(values, 20)
    widths = np.diff(10 ** (found["low"] + found["step"] * np.arange(21)))
    mass = sum(d * w for d, w in zip(found["density"], widths, strict=True) if d)
    assert mass == pytest.approx(1, abs=2e-3)


def test_tail_line_is_the_fitted_density():
    generator = torch.Generator().manual_seed(0)
    # A Pareto law of alpha 2.5 from 1.
    values = (
        ((1 - torch.rand(20_000, generator=generator, dtype=torch.float64)) ** (-1 / 1.5))
        .sort()
        .values
    )
    fit = ESTIMATORS["ks"](values)
    found = histogram(values, 40) | {
        "alpha": fit.alpha, "xmin": fit.xmin, "tail": fit.tail_size, "size": len(values),
    }  # fmt: skip
    (x, y), (far, low) = tail_line(found)
    assert y == pytest.approx(1.5 * x**-2.5, rel=0.1)
    # The middle of a wide bin is not its mean; a factor of 1.3 is far less than the three decades drawn.
    inside = [(a, b) for a, b in points(found) if x < a < 20]
    assert len(inside) > 5
    for a, b in inside:
        assert b == pytest.approx(1.5 * a**-2.5, rel=0.35)
    assert low < y
    assert far > x


def test_page_holds_every_section_and_loads_nothing(page_file):
    html = page_file.read_text(encoding="utf-8")
    for section in (
        "card",
        "plans",
        "alpha",
        "projection",
        "results",
        "tasks",
        "speed",
        "curves",
        "protocol",
    ):
        assert f'id="{section}"' in html
        assert f'href="#{section}"' in html
    assert not re.search(r'(src|href)="(?!#|data:)', html)
    assert len(html) < 2_000_000
    assert "2.00×" in html
    (dense, sparse) = (
        json.loads((page_file.parent / n).read_text())["tasks"]["piqa"]["metrics"]["acc_norm"]
        for n in ("dense-tasks.json", "tasks.json")
    )
    for accuracy in (dense, sparse):
        assert f"{accuracy['value']:.3f} ± {accuracy['stderr']:.3f}" in html
    assert "Mean accuracy against realised sparsity" in html
    assert "fingerprint" in html


def test_sections_without_data_are_left_out():
    html = render(Report("m", rows=[ROW, ROW | {"allocator": "uniform", "perplexity": None}]))
    assert "not finite" in html
    for section in ("plans", "alpha", "projection", "speed", "curves", "tasks"):
        assert f'id="{section}"' not in html
    assert "<script" not in html


def test_names_are_escaped():
    html = render(
        Report("<b>m</b>", rows=[ROW, ROW | {"allocator": "<script>x</script>", "sparsity": 0.5}])
    )
    assert "<script>x" not in html
    assert "<b>m" not in html


def test_a_large_model_stays_below_two_megabytes():
    entry = {
        "low": -3.123,
        "step": 0.12345,
        "alpha": 2.345,
        "xmin": 0.0123,
        "tail": 1234,
        "size": 8192,
    }
    count = 882  # a model of 405B parameters
    from acttail.report.density import bins

    spectra = {
        f"model.layers.{i // 7}.mlp.kind{i % 7}_proj": entry | {"density": [1.234e-5] * bins(count)}
        for i in range(count)
    }
    fits = [
        {"projection": n, "block": i // 7, "kind": f"kind{i % 7}", "d_out": 53248, "d_in": 16384, "alpha": 2.0 + i / 99,
         "ks_distance": 0.1, "flag": None, "stderr": 0.1}
        for i, n in enumerate(spectra)
    ]  # fmt: skip
    assert len(render(Report("large", spectra=spectra, fits=fits))) < 2_000_000


def test_charts_take_what_comes():
    assert "No finite values" in line_chart({}, title="t", x_label="x", y_label="y")
    one = line_chart({"a": [(0.5, 3.0, 0.1)]}, title="t", x_label="x", y_label="y")
    assert "<circle" in one
    flat = line_chart(
        {"a": [(0.1, 2.0, None), (0.2, 2.0, None)]}, title="t", x_label="x", y_label="y", log=False
    )
    assert "NaN" not in flat
    assert "nan" not in flat


def test_heat_maps():
    found = grid([("q", 0, 0.1), ("q", 1, 0.9), ("down", 1, 0.5), ("down", 0, None), ("q", 1, 0.7)])
    assert found.values["q", 1] == pytest.approx(0.8)
    assert ("down", 0) not in found.values
    drawn = svg(found, title="t")
    assert drawn.count("data-cell") == 3
    assert "block 1, q: 0.800" in drawn
    shown = terminal(found, title="sparsity").splitlines()
    assert shown[1].endswith("│  ██│")
    assert shown[2].endswith("│··▒▒│")
    wide = terminal(grid([("q", b, b / 200) for b in range(200)]), title="t")
    assert max(map(len, wide.splitlines())) <= 80
    assert "no values" in terminal(grid([]), title="t")
    # An outlier does not take the colours from the rest.
    many = grid([("q", b, 1 + b / 100) for b in range(99)] + [("q", 99, 50.0)])
    assert many.colours[1] < 3
    assert "and more" in svg(many, title="t")


def test_bad_input_is_named(tiny_folder, files, tmp_path):
    other = tmp_path / "x.json"
    other.write_text('{"what": 1}')
    with pytest.raises(ActTailError, match="not a result of"):
        report_of(str(tiny_folder), results=[str(other)])
    with pytest.raises(ActTailError, match="cannot read"):
        report_of(str(tiny_folder), results=[str(tmp_path / "none.json")])
    data = json.loads((files / "plan.json").read_text())
    data["projections"] = dict(list(data["projections"].items())[1:])
    other.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="does not mention"):
        report_of(str(tiny_folder), plans=[str(other)])


def test_command(tiny_folder, files, tmp_path):
    out = tmp_path / "r.html"
    done = CliRunner().invoke(
        app, ["report", str(tiny_folder), "--plan", str(files / "plan.json"), "-o", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "report written to" in done.output
    assert 'id="plans"' in out.read_text(encoding="utf-8")


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_in_a_browser(page_file, width, scheme):
    with page_of(page_file.as_uri(), width=width, scheme=scheme) as (page, said):
        first = page.locator("#picked").inner_text()
        assert "alpha" in first
        assert page.locator("#esd circle").count() > 5
        assert page.locator("#curve polyline").count() == 1
        # By keyboard: the picker, then the button.
        page.locator("#pick").focus()
        page.keyboard.press("ArrowDown")
        second = page.locator("#picked").inner_text()
        assert second != first
        page.locator("#next").focus()
        page.keyboard.press("Enter")
        assert page.locator("#picked").inner_text() not in (first, second)
        # By a cell of a heat map.
        page.locator('#plans [data-cell="1/down"]').click()
        assert "layers.1.mlp.down_proj" in page.locator("#picked").inner_text()
        assert page.locator(".chosen").count() >= 1
        page.locator("summary").first.press("Enter")
        assert page.locator("details[open] table").first.is_visible()
        # Nothing is wider than the screen, and nothing was complained of.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert said == []
        # Every image has a text alternative, every control a name.
        assert page.locator("svg:not([aria-label])").count() == 0
        assert page.locator("h1").count() == 1


@needs_browser
def test_without_scripts_and_in_print(page_file):
    with page_of(page_file.as_uri(), scripts=False) as (page, _):
        assert page.locator("#esd circle").count() > 5
        assert not page.locator("#pick").is_visible()
        assert page.locator("#results table").is_visible()
    with page_of(page_file.as_uri()) as (page, said):
        page.emulate_media(media="print")
        assert not page.locator("nav").is_visible()
        assert len(page.pdf()) > 10_000
        assert said == []


HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>'


def test_no_name_of_a_file_becomes_markup(files, tiny_folder, tmp_path):
    """Whatever text a plan, curves or results may hold is shown as text."""
    data = json.loads((files / "plan.json").read_text())
    data |= {"model": HOSTILE, "allocator": HOSTILE, "arguments": {HOSTILE: HOSTILE}}
    data["created_with"] = {HOSTILE: HOSTILE}
    for entry in data["projections"].values():
        entry |= {"kind": HOSTILE, "flag": HOSTILE}
    plan = tmp_path / f"{HOSTILE.replace('/', '')}.json"
    plan.write_text(json.dumps(data))
    about = {"loss": HOSTILE, HOSTILE: HOSTILE}
    grid_ = np.array([0.0, 0.5, 0.9])
    SensitivityCurves(grid_, {HOSTILE: 2 * grid_, f"a.{HOSTILE}": 3 * grid_}, about).save(
        tmp_path / "curves.safetensors"
    )
    metric = {"metrics": {HOSTILE: {"value": 0.5, "stderr": 0.1}}}
    row = ROW | {"model": HOSTILE, "allocator": HOSTILE, "rule": HOSTILE, "text": HOSTILE, "dtype": HOSTILE,
                 "prefill": HOSTILE, "versions": {HOSTILE: HOSTILE}, "tasks": {HOSTILE: metric}}  # fmt: skip
    speed = SPEED | {
        "dtype": HOSTILE, "tokens_per_second": {HOSTILE: 1.0}, "ratios": {},
        "bytes_per_token": {HOSTILE: 1e6}, "bandwidth_share": {HOSTILE: 0.5},
    }  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    report = report_of(
        str(tiny_folder), plans=[str(plan)], results=[str(tmp_path / "rows.json"), str(tmp_path / "speed.json")],
        curves=str(tmp_path / "curves.safetensors"), with_spectra=False,
    )  # fmt: skip
    page = render(report)
    assert page.count("alert(2)") > 20
    assert "<img" not in page
    assert page.count("<script") == 2  # the data and the page's own


def test_only_the_pages_own_script_and_style_run(page_file):
    page = page_file.read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert "unsafe" not in policy
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    # What the policy would not let through.
    assert not re.search(r"<[^>]+\s(style|on\w+)=", page)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (ROW | {"perplexity": "<b>"}, "perplexity is wrong"),
        (ROW | {"realised_sparsity": 7}, "realised_sparsity is out of range"),
        (ROW | {"tasks": {"t": {"metrics": {}}}}, "metrics is out of range"),
        (SPEED | {"tokens_per_second": {}}, "tokens_per_second is out of range"),
        (SPEED | {"ratios": {"dense": 2}}, "ratios.dense is wrong"),
        (SPEED | {"bytes_per_token": {}}, "bytes_per_token lacks the key"),
        ({"a": 1}, "its rows hold a"),
    ],
)
def test_malformed_results_are_one_line(tmp_path, row, says):
    path = tmp_path / "row.json"
    path.write_text(json.dumps(row))
    with pytest.raises(ActTailError, match=says) as found:
        add_results(Report(""), str(path))
    assert str(path) in str(found.value)


def test_a_cell_that_was_out_of_reach_is_a_row(tmp_path):
    path = tmp_path / "sweep.csv"
    path.write_text(
        "allocator,sparsity,realised_sparsity,perplexity,unreachable\nuniform,0.5,0.5,13,\ntheory,0.5,,,too far\n"
    )
    found = Report("")
    add_results(found, str(path))
    assert "theory" in render(found)


@pytest.mark.parametrize("log", [True, False])
def test_what_no_axis_holds_is_left_out(log):
    far = [
        (0.2, 2.0, 1e308),
        (0.1, 1e308, None),
        (0.2, 2.0, 0.1),
        (0.3, 5e-324, None),
        (0.2, 2.0, None),
    ]
    drawn = line_chart(
        {"a": far, "b": far[1:2]},
        title="t",
        x_label="x",
        y_label="y",
        log=log,
        reference=("r", 1e308),
    )
    assert drawn.count("<circle") == (3 if log else 4)
    assert "inf" not in drawn
    assert "No finite values" in line_chart(
        {"b": far[1:2]}, title="t", x_label="x", y_label="y", log=log
    )
