"""What became of damaged files, killed writers, full disks and clients that leave: runs the scripts that try them.

One row per format, writer or model; fills the tables of docs/reliability.md. Several results of one script count
together, so that a long run can be made in pieces (`scripts/fuzz.py --seed 1 --json 1.json`, and so on).

    python benchmarks/reliability.py [--mutations 2000] [--times 20] [--minutes 10] [--only fuzz]
    python benchmarks/reliability.py --read 1.json 2.json
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from common import HERE, On, Rows, fill, label, options

_SCRIPTS = HERE.parent / "scripts"
_FUZZ = ("used", "refused", "internal error", "signal", "hang")
_WRITERS = {"kill": ("old", "new", "neither", "left behind"),
            "full disk": ("old", "one line", "other ends", "neither", "left behind")}  # fmt: skip


def tried(args, folder):
    """Run the scripts; the files of their results."""
    mutations, times, minutes = (str(n) for n in (args.mutations, args.times, args.minutes))
    calls = {
        "fuzz": ["fuzz.py", "--mutations", mutations], "kill": ["kill.py", "--times", times],
        "full disk": ["kill.py", "--full", "--times", times],
        "soak": ["soak.py", "--model", args.model, "--minutes", minutes],
        "soak, tiny": ["soak.py", "--model", "tiny", "--minutes", minutes],
    }  # fmt: skip
    for i, (what, (script, *rest)) in enumerate(calls.items()):
        if args.only and not what.startswith(args.only):
            continue
        path = folder / f"{i}.json"
        # A status of 1 says that something was not as promised: the row says what.
        subprocess.run([sys.executable, _SCRIPTS / script, *rest, "--json", path], check=False)
        yield path


def rows_of(paths):
    """(what, of) -> everything that was counted."""
    counts, seeds = defaultdict(Counter), defaultdict(list)
    for path in paths:
        found = json.loads(Path(path).read_text())
        for of, ends in found["found"].items():
            known = counts[found["what"], of]
            for key, value in ends.items():
                known[key] = max(known[key], value) if key == "slowest" else known[key] + value
            seeds[found["what"], of].append(found["seed"])
    return {key: (dict(known), seeds[key]) for key, known in counts.items()}


def table(found, first, columns, title):
    lines = [f"| {first} | {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for (_, of), row in found.items():
        counts = json.loads(row["counts"])
        cells = [f"{counts.get(c, 0):,g}" for c in columns]
        lines.append(f"| {of} | {row['tried']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = options(__doc__, "model", "table")
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", help="fuzz, kill, full or soak")
    parser.add_argument("--read", nargs="+", help="results of the scripts instead of running them")
    args = parser.parse_args()
    rows = Rows("reliability", args.out)
    if not args.table_only:
        with tempfile.TemporaryDirectory() as folder:
            paths = args.read or list(tried(args, Path(folder)))
            for (what, of), (counts, seeds) in rows_of(paths).items():
                ends = _FUZZ if what == "fuzz" else ("old", "new", "neither")
                total = counts.get("requests") or sum(counts.get(end, 0) for end in ends)
                model = label(of) if what == "soak" else "tiny random llama"
                row = {"what": what, "of": of, "seeds": " ".join(map(str, seeds)), "tried": total}
                rows.append(row | {"counts": json.dumps(counts)}, On(model, "texts of the script"))
    for what, columns in {"fuzz": (*_FUZZ, "slowest"), **_WRITERS}.items():
        found = rows.latest("what", "of", what=what)
        first = "format" if what == "fuzz" else "writer"
        title = "mutations" if what == "fuzz" else "times"
        fill(args.out, "docs/reliability.md", what, table(found, first, columns, title))
    found = rows.latest("what", "of", "model", what="soak")
    shown = ("minutes", "clients", "whole", "left amid", "left early", "errors", "memory, first third, MB",
             "last third", "files before", "at most", "after")  # fmt: skip
    soaked = {key[:2]: row for key, row in found.items()}
    fill(args.out, "docs/reliability.md", "soak", table(soaked, "model", shown, "requests"))


if __name__ == "__main__":
    main()
