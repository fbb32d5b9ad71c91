"""`make demo`: the whole method on a real model, over text that every Python ships.

analyze -> plan -> compare -> generate -> measured decoding speed on SmolLM2-135M; the commands are printed, so that each can be repeated.
"""

import subprocess
import sys
import time
from pathlib import Path

MODEL = "smollm2-135m"
OUT = Path("demo")


def run(*arguments: str) -> None:
    print(f"\n$ acttail {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "acttail", *arguments], check=True)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    started = time.monotonic()
    print("acttail demo: activation sparsity on SmolLM2-135M (a few minutes on two cores)")
    run("analyze", MODEL, "-o", str(OUT / "alpha.json"))
    run("plan", MODEL, "--sparsity", "0.5", "-o", str(OUT / "plan.json"))
    run(
        "compare", MODEL, "--sparsity", "0.4,0.5,0.6", "--allocator", "uniform,acttail,depth",
        "--text", "python-docs:score", "--tokens", "8192", "--metrics", "perplexity,kl,top1",
        "-o", str(OUT / "compare.json"),
    )  # fmt: skip
    run(
        "generate", MODEL, "--plan", str(OUT / "plan.json"), "--chat", "--max-new-tokens", "48",
        "--prompt", "Why is the sky blue? Answer in one sentence.",
    )  # fmt: skip
    # transformers, native dense and native sparse: same prompt, same machine, by turns.
    run(
        "bench", MODEL, "--plan", str(OUT / "plan.json"), "--against", "hf", "--rounds", "3",
        "--new-tokens", "48", "-o", str(OUT / "bench.json"),
    )  # fmt: skip
    page = OUT / "report.html"
    run(
        "report", MODEL, "--plan", str(OUT / "plan.json"), "--results", str(OUT / "compare.json"),
        "--results", str(OUT / "bench.json"), "-o", str(page),
    )  # fmt: skip
    print(
        f"\nDone in {time.monotonic() - started:.0f} s. Open the report in a browser:\n  {page.resolve()}"
    )
    # The environment of `make` is not the caller's: name its program.
    program = Path(sys.executable).parent / "acttail"
    shown = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    print(
        f"Chat with the sparse model in a browser:\n  {shown} serve {MODEL} --plan {OUT / 'plan.json'}"
    )


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit(130)
