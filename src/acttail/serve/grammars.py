"""Answers held to a JSON schema: llguidance says before each token which ones may come."""

import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from acttail.engine import Engine
from acttail.errors import ActTailError

_REMEDY = (
    "response_format needs llguidance, which this server lacks: pip install 'acttail[structured]'"
)


class Grammars:
    """Compiles grammars for one model's tokens.

    Args:
        engine: with a tokenizer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tokens: Any = None
        self._lock = threading.Lock()

    def of_schema(self, schema: Mapping[str, Any]) -> "Matcher":
        """What holds an answer to a JSON schema; takes up to a second the first time.

        Raises:
            ActTailError: llguidance is not there, or cannot use this schema or this tokenizer.
        """
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise ActTailError(_REMEDY) from error
        tokens = self._tokenizer()
        try:
            # Without a limit a weak model fills its answer with blanks, which JSON allows anywhere.
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), defaults={"whitespace_flexible": False}
            )
        except ValueError as error:
            raise ActTailError(f"the schema cannot be used: {error}") from error
        matcher = LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise ActTailError(f"the schema cannot be used: {matcher.get_error()}")
        return Matcher(matcher)

    def _tokenizer(self) -> Any:
        with self._lock:
            if self._tokens is None:
                from llguidance.hf import from_tokenizer

                tokenizer = self._engine.tokenizer
                eos = sorted(self._engine.eos) or [tokenizer.eos_token_id]
                try:
                    self._tokens = from_tokenizer(
                        tokenizer, n_vocab=self._engine.vocabulary, eos_token=eos
                    )
                except (ValueError, TypeError) as error:
                    raise ActTailError(
                        f"response_format does not work with this model's tokenizer: {error}"
                    ) from error
            return self._tokens


class Matcher:
    """Where one answer is in its grammar; a :class:`acttail.engine.generation.Constraint`.

    Args:
        matcher: of llguidance, at the beginning.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> "Matcher":
        """Another answer at the same place."""
        return Matcher(self._matcher.deep_copy())

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [vocabulary] with -inf for what may not come next.

        Raises:
            ActTailError: the grammar became too complex.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ActTailError(f"the schema cannot be followed: {self._matcher.get_error()}")
        allowed = np.unpackbits(bits, bitorder="little")[: logits.numel()].astype(bool)
        found = torch.full_like(logits, float("-inf"))
        keep = torch.from_numpy(allowed)
        found[: len(keep)][keep] = logits[: len(keep)][keep]
        return found

    def accept(self, token: int) -> bool:
        """Go on by a token; whether the answer is complete with it."""
        if not self._matcher.consume_token(token):
            raise ActTailError(f"the schema cannot be followed: {self._matcher.get_error()}")
        return bool(self._matcher.is_stopped())
