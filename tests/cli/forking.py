"""Runs command lines one after the other, each in a child of a process that has imported everything already.

Started as a process of its own: it reads a JSON object a line (argv, env, stdin, stdout, stderr, encoding) and answers
with the exit status, negative for a signal, or "hangs".
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

SECONDS = 120


class Runner:
    """The other end of the process."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def __call__(
        self, *argv, stdout=None, stderr=None, stdin="", encoding="utf-8", env=None, seconds=SECONDS
    ):
        """(exit status, stdout, stderr) of a command line.

        Args:
            argv: after the program's name.
            stdout: a file to write to; "closed" for none, "gone" for a pipe that nobody reads.
            stderr: the same.
            stdin: what is typed.
            encoding: of both.
            env: more of the environment.
            seconds: after which it hangs.
        """
        self.count += 1
        paths = {name: str(self.folder / f"{self.count}.{name}") for name in ("in", "out", "err")}
        Path(paths["in"]).write_text(stdin)
        asked = {
            "argv": ["acttail", *map(str, argv)], "env": env or {}, "stdin": paths["in"], "stdout": stdout or paths["out"],
            "stderr": stderr or paths["err"], "encoding": encoding, "seconds": seconds,
        }  # fmt: skip
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        status = json.loads(self.process.stdout.readline())
        texts = [
            Path(paths[name]).read_text(encoding) if Path(paths[name]).is_file() else ""
            for name in ("out", "err")
        ]
        return status, *texts

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def _descriptor(place, number):
    if place == "closed":
        os.close(number)
        return
    if place == "gone":
        reader, found = os.pipe()
        os.close(reader)
    else:
        found = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(found, number)
    os.close(found)


def _stream(number, encoding, errors):
    try:
        raw = io.FileIO(number, "w", closefd=False)
    except OSError:
        return None
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding,
        errors,
        write_through=number == 2,
        line_buffering=number == 2,
    )


def _child(asked):
    from acttail import cli

    os.environ.update(asked["env"])
    sys.argv = asked["argv"]
    fed = os.open(asked["stdin"], os.O_RDONLY)
    os.dup2(fed, 0)
    os.close(fed)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    _descriptor(asked["stderr"], 2)
    _descriptor(asked["stdout"], 1)
    sys.stderr = _stream(2, asked["encoding"], "backslashreplace")
    sys.stdout = _stream(1, asked["encoding"], "strict")
    try:
        cli.main()
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 99
    try:
        # As the interpreter does at exit.
        sys.stdout.flush()
    except (OSError, ValueError):
        status = 120
    os._exit(status)


def _import_everything():
    """What any command imports, once; a child would spend most of its time on it."""
    import pkgutil
    from importlib import import_module

    import acttail

    for module in pkgutil.walk_packages(acttail.__path__, "acttail."):
        # Some need an extra that is not installed.
        with contextlib.suppress(ImportError):
            if not module.name.endswith("__main__"):
                import_module(module.name)
    import transformers.generation
    import transformers.models.llama.modeling_llama
    import transformers.tokenization_utils_fast  # noqa: F401


def _serve():
    _import_everything()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _child(asked)
        deadline = time.monotonic() + asked["seconds"]
        status = None
        while status is None:
            done, how = os.waitpid(child, os.WNOHANG)
            if done:
                status = -os.WTERMSIG(how) if os.WIFSIGNALED(how) else os.WEXITSTATUS(how)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                status = "hangs"
            else:
                time.sleep(0.02)
        answers.write(json.dumps(status) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
