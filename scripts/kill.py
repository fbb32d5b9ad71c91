"""Kill writers at random moments and fill their disk: what they replace is the old or the new thing, whole.

    python scripts/kill.py [--times 20] [--what convert] [--seed 0] [--json results.json]

Each writer of `WRITERS` replaces an old result that differs from the new one. It is killed by SIGKILL after a random
share of the time that it takes, often near its end; its result is opened as a user does, and what it left beside must be gone after the
next writer. `--full` lets the file system fail instead: after a random number of written bytes, every write does.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # before anything is imported that reads them
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path.append(str(Path(__file__).parents[1] / "tests"))
import resource

import torch
import tqdm.auto
from byte_tokens import byte_tokenizer
from families import config
from transformers import AutoModelForCausalLM

import acttail
from acttail.calibrate.calibration import Calibration
from acttail.calibrate.curves import SensitivityCurves
from acttail.calibrate.measure import measure
from acttail.calibrate.text import Text
from acttail.engine import Engine
from acttail.engine.source import convert_model
from acttail.errors import ActTailError
from acttail.evaluate.sweep import SweepSpec, cells, sweep
from acttail.report.gather import add_results
from acttail.report.page import Report
from acttail.share.hub import save

_TEXT = "The quick brown fox jumps over the lazy dog. " * 40
ENDS = ("old", "new", "neither", "left behind")


class Scene:
    """A folder with a tiny model in two versions, of other weights and sizes.

    Args:
        place: the folder.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.text = place / "text.txt"
        self.text.write_text(_TEXT)
        self.models = {}
        for version, blocks in (("old", 2), ("new", 3)):
            torch.manual_seed(blocks)
            base = config("llama").to_dict() | {"vocab_size": 260, "num_hidden_layers": blocks}
            model = AutoModelForCausalLM.from_config(config("llama").__class__(**base))
            self.models[version] = place / version
            model.save_pretrained(self.models[version])
            byte_tokenizer().save_pretrained(self.models[version])
        self.target = place / "out" / "target"
        self.target.parent.mkdir()


@dataclass(frozen=True)
class Writer:
    """What writes a result.

    Attributes:
        write: replaces the target by that of a version.
        version: opens the target and says which version it is; raises ActTailError if it is none, whole.
        ending: of the target's name.
    """

    write: Callable[[Scene, Path, str], object]
    version: Callable[[Scene, Path], str]
    ending: str = ""


def _convert(scene: Scene, target: Path, version: str) -> None:
    convert_model(scene.models[version], target, dtype="int8")


def _converted(scene: Scene, target: Path) -> str:
    engine = Engine.from_pretrained(target, threads=1)
    engine.generate("ab", max_new_tokens=1)
    return {2: "old", 3: "new"}[len(engine.packed.layout.spec.blocks)]


def _save(scene: Scene, target: Path, version: str) -> None:
    model, tokenizer = acttail.load(scene.models[version])
    plan = acttail.make_plan(model, 0.5, allocator="uniform")
    save(acttail.sparsify_(model, plan), tokenizer, target)


def _saved(scene: Scene, target: Path) -> str:
    model, _ = acttail.load(target)
    return {2: "old", 3: "new"}[model.config.num_hidden_layers]


_SPARSITIES = {"old": [0.3], "new": [0.3, 0.5, 0.6, 0.7]}


def _sweep(scene: Scene, target: Path, version: str) -> None:
    spec = SweepSpec(
        str(scene.models["old"]), str(scene.text), tokens=256, window=64, dtype="float32"
    )
    sweep(spec, cells(_SPARSITIES[version], ["uniform"]), target)


def _swept(scene: Scene, target: Path) -> str:
    report = Report("tiny")
    add_results(report, str(target))
    known = {1 + len(found): version for version, found in _SPARSITIES.items()}
    return known[len(report.rows)]


def _measure(scene: Scene, target: Path, version: str) -> None:
    model, tokenizer = acttail.load(scene.models[version], dtype="float32")
    calibration = Calibration(model, tokenizer, Text("t", _TEXT), tokens=512, window=64)
    measure(calibration, loss="fisher").save(target)


def _measured(scene: Scene, target: Path) -> str:
    return {14: "old", 21: "new"}[
        len([n for n in SensitivityCurves.load(target).curves if n != "lm_head"])
    ]


WRITERS: dict[str, Writer] = {
    "convert": Writer(_convert, _converted),
    "save": Writer(_save, _saved),
    "sweep": Writer(_sweep, _swept, ".csv"),
    "curves": Writer(_measure, _measured, ".safetensors"),
}


def started(scene: Scene, writer: Writer, target: Path, version: str, limit: int | None) -> int:
    """A child that writes; with a limit no file of it may have more bytes, as on a full disk."""
    child = os.fork()
    if child:
        return child
    status = 0
    # Progress bars share a lock with the parent, who would wait for ever for one that is held when its holder is killed.
    for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):
        bar.set_lock(threading.RLock())
    try:
        void = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(void, number)
        if limit is not None:
            # Python ignores the signal: the write fails with EFBIG, where a full disk has ENOSPC.
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        writer.write(scene, target, version)
    except ActTailError:
        status = 2
    except BaseException:
        status = 1
    os._exit(status)


def ended(child: int) -> int:
    """Its exit status; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(scene: Scene, writer: Writer, target: Path) -> str:
    """Which version the target is: "old", "new" or "neither"."""
    try:
        return writer.version(scene, target)
    except (ActTailError, KeyError, OSError):
        return "neither"


def strays(scene: Scene, target: Path) -> list[str]:
    """What lies beside the target that nobody asked for."""
    cells = f"{target.name}.cells"
    found = [p.name for p in target.parent.iterdir() if p.name not in (target.name, cells)]
    if (target.parent / cells).is_dir():
        found += [p.name for p in (target.parent / cells).iterdir() if p.name.startswith(".")]
    return found


def tried(name: str, scene: Scene, times: int, rng: random.Random, *, full: bool) -> Counter[str]:
    """End -> how often, of a writer that is stopped so many times."""
    writer = WRITERS[name]
    target = scene.target.with_name(f"{name}{writer.ending}")
    writer.write(scene, target, "new")  # all that is imported once is there before the first fork
    begun = time.monotonic()
    assert ended(started(scene, writer, target, "new", None)) == 0
    seconds, largest = time.monotonic() - begun, _largest(target)
    found: Counter[str] = Counter()
    for _ in range(times):
        _forget(scene, target)
        writer.write(scene, target, "old")
        limit = rng.randrange(largest) if full else None
        child = started(scene, writer, target, "new", limit)
        if full:
            # 2 is the one line that was promised.
            found["one line" if ended(child) == 2 else "other ends"] += 1
            found["left behind"] += bool(strays(scene, target))
        else:
            # Half of them near the end, where names are exchanged.
            share = rng.random() if rng.random() < 0.5 else rng.uniform(0.8, 1.1)
            time.sleep(share * seconds)
            os.kill(child, signal.SIGKILL)
            ended(child)
        found[state(scene, writer, target)] += 1
        if not full:
            writer.write(scene, target, "old")
            found["left behind"] += bool(strays(scene, target))
    return found


def _largest(target: Path) -> int:
    """Bytes of the largest file of a result: a lower limit makes its writer fail."""
    return max(p.stat().st_size for p in (target.rglob("*") if target.is_dir() else [target]))


def _forget(scene: Scene, target: Path) -> None:
    """Leave nothing that would spare a writer its work."""
    shutil.rmtree(target.with_name(f"{target.name}.cells"), ignore_errors=True)
    shutil.rmtree(os.environ["ACTTAIL_CACHE"], ignore_errors=True)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=20, help="of each writer")
    parser.add_argument("--what", choices=WRITERS, action="append", help="only these")
    parser.add_argument("--full", action="store_true", help="a full disk instead of a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write what was found here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in args.what or WRITERS:
        with tempfile.TemporaryDirectory(prefix="acttail-kill-") as folder:
            os.environ["ACTTAIL_CACHE"] = str(Path(folder) / "cache")
            rng = random.Random(f"{args.seed}/{name}")
            found[name] = tried(name, Scene(Path(folder)), args.times, rng, full=args.full)
        print(name, dict(found[name]), flush=True)
    if args.json:
        what = "full disk" if args.full else "kill"
        report = {"what": what, "seed": args.seed, "found": found}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    bad = ("neither", "left behind", "other ends")
    return int(any(f[end] for f in found.values() for end in bad))


if __name__ == "__main__":
    sys.exit(main())
