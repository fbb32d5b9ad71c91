"""llama.cpp as a contestant, through the decode loop of its C interface (package llama-cpp-python).

Its own files are made by its own quantiser from the model's GGUF, so that both sides start from the same
weights; nothing is timed through its Python generator.
"""

import ctypes
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch

from acttail.base.files import cache_dir, cannot_write, replacing
from acttail.engine.formats import weight_format
from acttail.errors import ActTailError


def require() -> Any:
    """The package llama_cpp.

    Raises:
        ActTailError: it is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise ActTailError(
            "comparing with llama.cpp needs its Python package: pip install llama-cpp-python"
        ) from error
    return llama_cpp


def requantised(gguf: Path, dtype: str) -> Path:
    """The model in the file type of this width; see :func:`quantised`."""
    return quantised(gguf, weight_format(dtype).llama_cpp)


def quantised(gguf: Path, kind: str) -> Path:
    """The model in one of llama.cpp's file types, made by its own quantiser once and kept in the cache.

    Args:
        gguf: the model's GGUF, of any width.
        kind: as llama.h names it after ``LLAMA_FTYPE_``, say ``MOSTLY_Q4_K_M``.

    Raises:
        ActTailError: llama.cpp does not know the type or cannot make it.
    """
    lib = require()
    number = getattr(lib, f"LLAMA_FTYPE_{kind}", None)
    if number is None:
        raise ActTailError(f"llama.cpp {lib.__version__} has no file type {kind}")
    stamp = f"{gguf.resolve()} {gguf.stat().st_size} {gguf.stat().st_mtime_ns} {lib.__version__}"
    key = hashlib.sha256(stamp.encode()).hexdigest()[:24]
    target = cache_dir() / "llama.cpp" / f"{key}-{kind}.gguf"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(target, error.strerror or str(error)) from error
    params = lib.llama_model_quantize_default_params()
    params.ftype = number
    params.allow_requantize = True
    _silence(lib)
    with replacing(target) as temporary:
        code = lib.llama_model_quantize(
            str(gguf).encode(), str(temporary).encode(), ctypes.byref(params)
        )
        if code:
            raise ActTailError(f"llama.cpp cannot turn {gguf.name} into {kind} (status {code})")
    return target


def _silence(lib: Any) -> None:
    """Its log goes to stderr, line by line; a benchmark's output is not the place for it."""
    if not hasattr(lib, "acttail_quiet"):
        lib.acttail_quiet = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(lib.acttail_quiet, ctypes.c_void_p(0))


class LlamaCppContestant:
    """A model in llama.cpp, greedy, on the CPU.

    Args:
        gguf: the model's file.
        threads: that decode.
        context: positions of its KV cache.

    Raises:
        ActTailError: the package is missing or the file cannot be loaded.
    """

    def __init__(self, gguf: str | os.PathLike[str], threads: int, context: int) -> None:
        self._lib = lib = require()
        _silence(lib)
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(os.fsencode(gguf), params)
        if not self._model:
            raise ActTailError(f"llama.cpp cannot load {gguf}")
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, min(context, 512), 512
        options.n_threads = options.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._context:
            raise ActTailError(f"llama.cpp cannot make a context of {context} tokens")
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self.bytes = int(lib.llama_model_size(self._model))

    def close(self) -> None:
        """Free the model and its context."""
        if getattr(self, "_context", None):
            self._lib.llama_free(self._context)
            self._context = None
        if getattr(self, "_model", None):
            self._lib.llama_model_free(self._model)
            self._model = None

    def _decode(self, tokens: list[int]) -> Any:
        """Feed tokens; returns a pointer to the last one's logits."""
        array = (self._lib.llama_token * len(tokens))(*tokens)
        code = self._lib.llama_decode(
            self._context, self._lib.llama_batch_get_one(array, len(tokens))
        )
        if code:
            raise ActTailError(f"llama.cpp failed to decode (status {code})")
        return self._lib.llama_get_logits_ith(self._context, -1)

    def _best(self, logits: Any) -> int:
        buffer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._vocabulary)).contents
        return int(torch.frombuffer(buffer, dtype=torch.float32).argmax())

    def reset(self) -> None:
        """Forget the sequence."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def round(self, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        """See :class:`acttail.evaluate.speed.Contestant`."""
        self.reset()
        started = time.perf_counter()
        token = self._best(self._decode(prompt.tolist()))
        prefilled = time.perf_counter()
        for _ in range(new_tokens):
            token = self._best(self._decode([token]))
        return prefilled - started, time.perf_counter() - prefilled

    def window_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary] float32 logits of every position of one window, for perplexity.

        Args:
            tokens: [n] int64, at most the context.
        """
        self.reset()
        lib = self._lib
        rows = []
        for start in range(0, len(tokens), 256):
            piece = tokens[start : start + 256].tolist()
            batch = lib.llama_batch_init(len(piece), 0, 1)
            batch.n_tokens = len(piece)
            for i, token in enumerate(piece):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.logits[i] = 1, 1
                batch.seq_id[i][0] = 0
            code = lib.llama_decode(self._context, batch)
            if code:
                lib.llama_batch_free(batch)
                raise ActTailError(f"llama.cpp failed to decode (status {code})")
            for i in range(len(piece)):
                pointer = lib.llama_get_logits_ith(self._context, i)
                kind = ctypes.POINTER(ctypes.c_float * self._vocabulary)
                buffer = ctypes.cast(pointer, kind).contents
                rows.append(torch.frombuffer(buffer, dtype=torch.float32).clone())
            lib.llama_batch_free(batch)
        return torch.stack(rows)
