"""A fork of llama.cpp as a contestant, through its own `llama-bench` binary and the JSON that it prints."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from acttail.errors import ActTailError

# A round decodes some hundred tokens; a binary that says nothing for this long hangs.
_PATIENCE = 600.0


class LlamaBenchContestant:
    """A GGUF in a `llama-bench` that the user has built, ik_llama.cpp's say: one run of the binary per round.

    Loading and the binary's own warm-up are not counted: the times are those that it prints.

    Args:
        binary: path of `llama-bench`.
        gguf: the model's file.
        threads: that decode.
        options: passed on, for example ``("-rtr", "1")`` for ik_llama.cpp's interleaved rows.

    Raises:
        ActTailError: the binary or the file is not there.
    """

    def __init__(
        self,
        binary: str | os.PathLike[str],
        gguf: str | os.PathLike[str],
        threads: int,
        options: tuple[str, ...] = (),
    ) -> None:
        self._binary, self._gguf = Path(binary), Path(gguf)
        if not os.access(self._binary, os.X_OK) or self._binary.is_dir():
            raise ActTailError(f"{binary} is no program: give the path of a llama-bench")
        if not self._gguf.is_file():
            raise ActTailError(f"no such file: {gguf}")
        self._threads, self._options = threads, options

    def round(self, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        """See :class:`acttail.evaluate.speed.Contestant`; llama-bench decodes from an empty context.

        Raises:
            ActTailError: it failed, or printed something else than its results.
        """
        command = [
            str(self._binary), "-m", str(self._gguf), "-p", str(len(prompt)), "-n", str(new_tokens),
            "-t", str(self._threads), "-r", "1", "-o", "json", *self._options,
        ]  # fmt: skip
        try:
            done = subprocess.run(  # noqa: S603 (the user's own binary)
                command, capture_output=True, text=True, timeout=_PATIENCE, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ActTailError(f"{self._binary}: {error}") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
            raise ActTailError(f"{self._binary} failed (status {done.returncode}): {last}")
        return seconds(done.stdout, str(self._binary))


def seconds(printed: str, who: str) -> tuple[float, float]:
    """(seconds of the prompt, seconds of decoding) from what `llama-bench -o json` printed.

    Args:
        printed: its standard output; lines before the list are passed over.
        who: named in errors.

    Raises:
        ActTailError: the two tests are not both in it.
    """
    found: dict[bool, float] = {}
    try:
        tests: list[dict[str, Any]] = json.loads(printed[printed.index("[") :])
        for test in tests:
            if bool(test["n_prompt"]) != bool(test["n_gen"]):
                found[bool(test["n_gen"])] = float(test["avg_ns"]) / 1e9
        return found[False], found[True]
    except (ValueError, KeyError, TypeError) as error:
        raise ActTailError(
            f"{who} printed no results that acttail understands: {error!r}"
        ) from error
