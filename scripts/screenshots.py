"""Make the pictures of the documentation anew: the report, the chat page, the terminal.

    python scripts/screenshots.py REPORT.html PLAN.json [CURVES.safetensors]

Needs Chromium and the test extra; writes into docs/images.
"""

import io
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import page_of  # noqa: E402

IMAGES = ROOT / "docs" / "images"
QUESTION = "Why is the sky blue? Answer in one sentence."


def report(path):
    with page_of(Path(path).resolve().as_uri(), width=1100, height=1500) as (page, said):
        page.screenshot(path=IMAGES / "report.png")
        assert said == []
    with page_of(Path(path).resolve().as_uri(), width=390, height=844, scheme="dark") as (page, _):
        page.screenshot(path=IMAGES / "report-phone.png")


def chat(plan, curves):
    command = [
        sys.executable,
        "-m",
        "acttail",
        "serve",
        "smollm2-135m",
        "--plan",
        plan,
        "--dtype",
        "int8",
        "--port",
        "0",
    ]
    command += ["--curves", curves] if curves else []
    server = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    try:
        url = next(line.split()[-1] for line in server.stderr if line.startswith("chat page"))
        with page_of(url, width=900, height=620) as (page, said):
            page.locator("#about", has_text="engine").wait_for()
            page.locator("#temperature").fill("0")
            for text, sparsity in ((QUESTION, None), ("And at night?", "0.3")):
                if sparsity and curves:
                    page.locator("#sparsity").fill(sparsity)
                page.locator("#prompt").fill(text)
                page.keyboard.press("Enter")
                page.locator("li.assistant small").nth(0 if sparsity is None else 1).wait_for(
                    timeout=60_000
                )
            page.screenshot(path=IMAGES / "chat.png")
            assert said == []
    finally:
        server.terminate()
        server.wait()


def terminal(plan):
    """Real output of three commands at 80 columns, drawn by rich."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    environment = {**os.environ, "COLUMNS": "80", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    for arguments in (
        ["plan", "smollm2-135m", "--sparsity", "0.5", "-o", "plan.json"],
        ["generate", "smollm2-135m", "--plan", plan, "--dtype", "int8", "--chat", "--max-new-tokens", "48", "--prompt", QUESTION],
    ):  # fmt: skip
        shown = ["plan.json" if a == plan else f'"{a}"' if " " in a else a for a in arguments]
        console.print(f"$ acttail {' '.join(shown)}", highlight=False)
        done = subprocess.run(
            [sys.executable, "-m", "acttail", *arguments], capture_output=True, text=True, check=True,
            env=environment, cwd=os.environ.get("TMPDIR", "/tmp"),
        )  # fmt: skip
        console.print(Text.from_ansi(done.stdout.rstrip()))
        # Without the bars: a terminal draws each over the one before.
        kept = [x for x in done.stderr.splitlines() if x.strip() and "━" not in x and "0/" not in x]
        if kept:
            console.print(Text.from_ansi("\n".join(kept)))
    svg = console.export_svg(title="acttail")
    # Fonts from elsewhere would be fetched by whoever opens the file.
    while "@font-face" in svg:
        before, _, rest = svg.partition("@font-face")
        svg = before + rest.partition("}")[2]
    (IMAGES / "terminal.svg").write_text(svg, encoding="utf-8")


def main():
    page, plan, *curves = sys.argv[1:]
    report(page)
    chat(str(Path(plan).resolve()), curves[0] if curves else None)
    terminal(str(Path(plan).resolve()))


if __name__ == "__main__":
    main()
