"""Open damaged files of every format as a user does: each is used or refused in one line, in ten seconds.

    python scripts/fuzz.py [--mutations 2000] [--format gguf] [--seed 0] [--json results.json]
    python scripts/fuzz.py --format gguf --case 17 [--keep DIR]    # one again, with its traceback

A mutation is drawn from the seed, the format and its number alone, so that each can be made again. It is opened in a
forked child with bounded memory; the status is 1 if one ended in another way than promised.
"""

import argparse
import faulthandler
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # before anything is imported that reads them
    os.environ |= {
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "ACTTAIL_CACHE_LIMIT": "0",
    }  # fmt: skip
sys.path.insert(0, str(Path(__file__).parent))
from fuzz_damage import damage_file, damage_folder
from fuzz_formats import FORMATS, Format, Models, copied

from acttail.errors import ActTailError

SECONDS = 10
# More than a tiny model ever takes, and less than a hostile length asks for.
_MEMORY = 4 << 30
ENDS = ("used", "refused", "internal error", "signal", "hang")
BAD = ENDS[2:]


@dataclass
class Found:
    """What became of one format's mutations.

    Attributes:
        counts: end -> mutations.
        bad: what is not as promised: a line of what happened -> numbers of mutations.
        slowest: seconds.
    """

    counts: Counter[str] = field(default_factory=Counter)
    bad: dict[str, list[int]] = field(default_factory=dict)
    slowest: float = 0.0


def tidy(line: str) -> bool:
    """Whether a message is one line that a terminal shows as it is."""
    return bool(line) and line.isprintable() and len(line) < 2000


def attempt(kind: Format, models: Models, path: Path, rng: random.Random) -> tuple[str, str]:
    """How using a file ends, and what was said."""
    try:
        kind.use(models, path, rng)
    except ActTailError as error:
        line = str(error)
        if tidy(line):
            return "refused", line
        return "internal error", f"no line to show: {line[:300]!r}"
    except BaseException as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "acttail" in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return "internal error", f"{type(error).__name__} at {where}: {str(error)[:160]!r}"
    return "used", ""


def prepared(
    name: str, samples: list[Path], seed: int, index: int, place: Path
) -> tuple[Path, random.Random]:
    """A damaged copy of a sample."""
    rng = random.Random(f"{seed}/{name}/{index}")
    path = copied(rng.choice(samples), place)
    (damage_folder if path.is_dir() else damage_file)(rng, path)
    return path, rng


def forked(kind: Format, models: Models, path: Path, rng: random.Random) -> tuple[str, str]:
    """:func:`attempt` in a child that may die or hang."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        void = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(void, number)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warnings.simplefilter("ignore")
        faulthandler.disable()
        os.write(writer, json.dumps(attempt(kind, models, path, rng)).encode()[:60_000])
        os._exit(0)
    os.close(writer)
    try:
        if not select.select([reader], [], [], SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            return "hang", f"{SECONDS} s"
        said = os.read(reader, 65536)
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "signal", signal.Signals(os.WTERMSIG(status)).name
    if not said:
        return "internal error", f"exit {os.WEXITSTATUS(status)}"
    end, line = json.loads(said)
    return end, line


def run(name: str, models: Models, mutations: int, seed: int) -> Found:
    """Try a format's mutations; whatever is not as promised is kept with its number."""
    kind, found = FORMATS[name], Found()
    with tempfile.TemporaryDirectory(dir=models.place) as folder:
        samples = kind.write(models, Path(folder))
        for sample in samples:  # all that is imported once is there before the first fork
            for use in range(8):
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    kind.use(models, copied(sample, Path(place)), random.Random(use))
        for index in range(mutations):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                path, rng = prepared(name, samples, seed, index, Path(place))
                started = time.monotonic()
                end, line = forked(kind, models, path, rng)
            found.slowest = max(found.slowest, time.monotonic() - started)
            found.counts[end] += 1
            if end in BAD:
                found.bad.setdefault(f"{end}: {line}", []).append(index)
    return found


def again(name: str, models: Models, seed: int, index: int, keep: str | None) -> None:
    """One mutation in this process, with its traceback."""
    place = Path(keep or tempfile.mkdtemp(dir=models.place))
    place.mkdir(parents=True, exist_ok=True)
    kind = FORMATS[name]
    made = Path(tempfile.mkdtemp(dir=models.place))
    path, rng = prepared(name, kind.write(models, made), seed, index, place)
    print(path)
    kind.use(models, path, rng)


def table(found: dict[str, Found]) -> str:
    """The counts in Markdown."""
    lines = [f"| format | mutations | {' | '.join(ENDS)} | slowest |", "|---" * 8 + "|"]
    for name, f in found.items():
        counts = " | ".join(str(f.counts[end]) for end in ENDS)
        lines.append(f"| {name} | {f.counts.total()} | {counts} | {f.slowest:.1f} s |")
    return "\n".join(lines)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=2000, help="of each format")
    parser.add_argument("--format", choices=FORMATS, action="append", help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="one mutation, in this process")
    parser.add_argument("--keep", help="a folder for the damaged file of --case")
    parser.add_argument("--json", help="write what was found here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="acttail-fuzz-") as folder:
        os.environ["ACTTAIL_CACHE"] = str(Path(folder) / "cache")
        models = Models(Path(folder))
        if args.case is not None:
            again(args.format[0], models, args.seed, args.case, args.keep)
            return 0
        found = {}
        for name in args.format or FORMATS:
            started = time.monotonic()
            found[name] = run(name, models, args.mutations, args.seed)
            took = time.monotonic() - started
            print(f"{name}: {dict(found[name].counts)} in {took:.0f} s", flush=True)
            for line, cases in found[name].bad.items():
                print(f"  {line} ({len(cases)}: {cases[:5]})", flush=True)
    print(table(found))
    if args.json:
        counts = {n: f.counts | {"slowest": round(f.slowest, 1)} for n, f in found.items()}
        report = {
            "what": "fuzz", "seed": args.seed, "found": counts, "bad": {n: f.bad for n, f in found.items()},
        }  # fmt: skip
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return int(any(f.bad for f in found.values()))


if __name__ == "__main__":
    sys.exit(main())
