"""The documentation does what it says: the tutorial's blocks run, the notebook runs, the site builds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def blocks(page):
    """(language, text) of a page's fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.first
def test_tutorial_runs(tmp_path):
    if not (ROOT / "docs").exists():
        pytest.skip("no docs beside the tests")
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "80", "ACTTAIL_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    ran = 0
    for language, text in blocks(ROOT / "docs" / "tutorial.md"):
        if language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", text]
        elif language == "python":
            command = [sys.executable, "-c", text]
        else:
            continue
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 8
    for name in ("plan.json", "better.json", "report.html", "sparse-model/README.md"):
        assert (tmp_path / name).exists()


@pytest.mark.slow
@pytest.mark.first
def test_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    client = nbclient.NotebookClient(
        notebook,
        timeout=900,  # a cell; the machine may be slow, and busy with other tests
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    printed = "".join(
        out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ())
    )
    assert "perplexity" in printed


@pytest.mark.slow
def test_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        str(ROOT / "mkdocs.yml"),
        "-d",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "reference" / "plans" / "index.html").read_text(encoding="utf-8")
    assert "make_plan" in page
    assert "BudgetError" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT / "docs")))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_command_is_documented():
    from acttail.cli import app

    overview = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert f"acttail {command.name}" in overview, command.name


def test_every_dependency_has_a_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    wanted = [
        *project["dependencies"],
        *(d for group in project["optional-dependencies"].values() for d in group),
    ]
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)[0]
        if name != "acttail":
            assert name in reasons, name


def test_version_is_the_same_everywhere():
    import yaml

    from acttail import __version__

    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
