"""Decoding of an older revision against this tree, by turns: a rebuilt house must not be slower.

Checks the revision out beside, compiles its kernels, keeps one process of each tree with the same model and
a uniform plan, and lets them decode 128 tokens in turn. Appends to revisions.csv and fills the table of
docs/performance.md. Needs git, cmake and a compiler.

    python benchmarks/revisions.py --revision 90bfde1 [--widths bf16,int8,int4] [--threads 1,2] [--table-only]
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from common import HERE, On, Rows, fill, label, options
from decoding import shown
from timing import ratio

NEW = 128
SPARSITIES = (0.0, 0.5)
# Public names only: both trees run this.
WORKER = """
import json, sys
import torch, acttail
from acttail.engine import Engine, Sampling
asked = json.loads(sys.stdin.readline())
torch.set_num_threads(asked["threads"])
plan = acttail.make_plan(asked["model"], 0.5, allocator="uniform")
dense = Engine.from_pretrained(
    asked["model"], plan, dtype=asked["dtype"], native=True, threads=asked["threads"]
)
engines = {0.0: dense.with_plan(None), 0.5: dense}
prompt = torch.arange(128) + 500
print(json.dumps(acttail.__file__), flush=True)
for line in sys.stdin:
    done = engines[float(line)].generate(
        prompt, max_new_tokens=asked["new"], sampling=Sampling(ignore_eos=True)
    )
    print(json.dumps(done.decode_seconds), flush=True)
"""


def checked_out(revision, folder):
    """The tree of a revision, its kernels compiled and in place."""
    subprocess.run(
        ["git", "-C", str(HERE.parent), "worktree", "add", "--detach", str(folder), revision],
        check=True, capture_output=True,
    )  # fmt: skip
    build = folder / "build" / "revision"
    for command in (
        ["cmake", "-S", str(folder), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", str(build), "-j"],
    ):
        subprocess.run(command, check=True, capture_output=True)
    library = next(build.rglob("libacttail_native.*"))
    shutil.copy(library, folder / "src" / "acttail" / "_native")
    return folder / "src"


class Tree:
    """A process that decodes with the package of one source tree; None is the installed one."""

    def __init__(self, source, model, dtype, threads):
        env = dict(os.environ, TQDM_DISABLE="1")
        if source is not None:
            # Before the editable install's own finder, which would lead back to this tree.
            env["PYTHONPATH"] = str(source)
        code = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n{WORKER}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER if source is None else code],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        asked = {"model": model, "dtype": dtype, "threads": threads, "new": NEW}
        self.where = self.ask(json.dumps(asked))
        if source is not None and not str(self.where).startswith(str(source)):
            raise SystemExit(f"{source} was to be measured, and {self.where} was loaded")

    def ask(self, line):
        """The answer to a line."""
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a process of {getattr(self, 'where', 'a tree')} ended")
        return json.loads(answer)

    def close(self):
        """End it."""
        self.process.stdin.close()
        self.process.wait()


def measure(args, rows):
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "old"
        old = checked_out(args.revision, folder)
        stack.callback(
            subprocess.run,
            ["git", "-C", str(HERE.parent), "worktree", "remove", "--force", str(folder)],
        )
        for dtype in args.widths.split(","):
            for threads in (int(t) for t in args.threads.split(",")):
                trees = {name: Tree(at, args.model, dtype, threads) for name, at in (("old", old), ("new", None))}  # fmt: skip
                for sparsity in SPARSITIES:
                    seconds = {"old": [], "new": []}
                    for r in range(args.rounds + 1):
                        for name in ("old", "new") if r % 2 else ("new", "old"):
                            taken = trees[name].ask(sparsity)
                            if r:  # the first is a warm-up
                                seconds[name].append(taken)
                    over = ratio(seconds, "old", "new")
                    rows.append({
                        "revision": args.revision, "dtype": dtype, "decode_threads": threads, "sparsity": sparsity,
                        "tokens_per_second": round((NEW - 1) / statistics.median(seconds["new"]), 2),
                        **{f"over_old_{key}": value for key, value in over.items()}, "rounds": args.rounds,
                    }, On(label(args.model)))  # fmt: skip
                for tree in trees.values():
                    tree.close()


def table(found):
    if not found:
        return "Not measured yet."
    lines = ["| width | threads | S | tokens/s | ÷ the old revision |", "|---|---|---|---|---|"]
    for r in found.values():
        lines.append(
            f"| {r['dtype']} | {r['decode_threads']} | {r['sparsity']} | {float(r['tokens_per_second']):.0f} "
            f"| {shown(r, 'old')} |"
        )
    return "\n".join(lines)


def main():
    parser = options(__doc__, "model", "table", rounds=7)
    parser.add_argument("--revision", default="90bfde1", help="the older one (default 90bfde1)")
    parser.add_argument("--widths", default="bf16,int8,int4")
    parser.add_argument("--threads", default="1,2")
    args = parser.parse_args()
    rows = Rows("revisions", args.out)
    if not args.table_only:
        measure(args, rows)
    found = rows.latest("dtype", "decode_threads", "sparsity", revision=args.revision)
    fill(args.out, "docs/performance.md", "revisions", table(found))


if __name__ == "__main__":
    main()
