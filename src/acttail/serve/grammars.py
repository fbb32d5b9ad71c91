"""Answers held to a grammar: llguidance says before each token which ones may come."""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from acttail.engine import Engine
from acttail.errors import ActTailError


@dataclass(frozen=True)
class Grammar:
    """What an answer is held to.

    Attributes:
        text: in llguidance's dialect of Lark.
        param: field of the request that asks for it.
        schemas: JSON schemas in it, by where the request has them.
    """

    text: str
    param: str
    schemas: Mapping[str, Mapping[str, Any]]


def json_rule(schema: Mapping[str, Any], layout: Mapping[str, Any] | None = None) -> str:
    """A grammar's expression for JSON of a schema.

    Args:
        schema: of JSON.
        layout: of llguidance, how the JSON is written.
    """
    # Without a limit a weak model fills its answer with blanks, which JSON allows anywhere.
    settings = {"whitespace_flexible": False} | dict(layout or {})
    return f"%json {json.dumps({**schema, 'x-guidance': settings})}"


def grammar_of_schema(schema: Mapping[str, Any]) -> Grammar:
    """What holds an answer to a JSON schema alone."""
    text = f"%llguidance {{}}\nstart: {json_rule(schema)}\n"
    return Grammar(text, "response_format", {"response_format": schema})


class Grammars:
    """Compiles grammars for one model's tokens.

    Args:
        engine: with a tokenizer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tokens: Any = None
        self._lock = threading.Lock()

    def prepare(self, param: str) -> None:
        """Make the model's tokens known to llguidance; takes up to some ten seconds the first time.

        Args:
            param: field of the request that needs it.

        Raises:
            ActTailError: llguidance is not there, or cannot use this tokenizer.
        """
        _library(param)
        with self._lock:
            if self._tokens is None:
                self._tokens = _tokens(self._engine, param)

    def matcher(self, grammar: Grammar) -> "Matcher":
        """What holds an answer to a grammar.

        Raises:
            ActTailError: llguidance is not there, or cannot use this grammar or this tokenizer.
        """
        self.prepare(grammar.param)
        compiled = _library(grammar.param).LLMatcher
        matcher = compiled(self._tokens, grammar.text, log_level=0)
        if not matcher.is_error():
            return Matcher(matcher)
        for where, schema in grammar.schemas.items():
            alone = compiled(self._tokens, grammar_of_schema(schema).text, log_level=0)
            if alone.is_error():
                raise ActTailError(f"{where}: the schema cannot be used: {_reason(alone)}")
        raise ActTailError(
            f"{grammar.param}: the schemas cannot be used together: {_reason(matcher)}"
        )


def _library(param: str) -> Any:
    """llguidance, for a field of a request that needs it."""
    try:
        import llguidance
    except ImportError as error:
        raise ActTailError(
            f"{param} needs llguidance, which this server lacks: pip install 'acttail[structured]'"
        ) from error
    return llguidance


def _reason(matcher: Any) -> str:
    """What llguidance says is wrong, without the grammar, which is not the client's."""
    said = str(matcher.get_error())
    return said.partition("failed to compile JSON schema: ")[2].partition("\n   1 | ")[0] or said


def _tokens(engine: Engine, param: str) -> Any:
    """A model's tokens for llguidance.

    By itself it takes every added token that looks like a tag for a special one, which no text has. Models write
    ``<tool_call>`` and ``<think>`` by such tokens, and they are text to everybody else.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    tokenizer, count = engine.tokenizer, engine.vocabulary
    eos = sorted(engine.eos) or [tokenizer.eos_token_id]
    try:
        backend = tokenizer.backend_tokenizer
        plain = LLTokenizer(_described(backend), n_vocab=count, eos_token=eos)
        added = backend.get_added_tokens_decoder()
        text = {i: t.content.encode() for i, t in added.items() if not t.special}
        if not any(map(plain.is_special_token, text)):
            return plain
        wrapped = TokenizerWrapper(_Tokens(backend, plain, text, eos[0]))
        return LLTokenizer(wrapped, n_vocab=count, eos_token=eos)
    except (AttributeError, ValueError, TypeError) as error:
        raise ActTailError(f"{param} does not work with this model's tokenizer: {error}") from error


def _described(backend: Any) -> str:
    """A tokenizer as tokenizers writes it, without what it does to several texts."""
    described = str(backend.to_str())
    if backend.truncation is None and backend.padding is None:
        return described
    return json.dumps(json.loads(described) | {"truncation": None, "padding": None})


class _Tokens:
    """A tokenizer as llguidance takes one that it does not know.

    Args:
        backend: of tokenizers.
        plain: llguidance's own view of the tokens.
        text: what added tokens say that are not special, by id.
        eos: the token that ends a text.
    """

    def __init__(self, backend: Any, plain: Any, text: Mapping[int, bytes], eos: int) -> None:
        self._backend = backend
        self.eos_token_id, self.bos_token_id = eos, None
        ids = range(plain.vocab_size)
        self.tokens = [text.get(i) or plain.decode_bytes([i]) for i in ids]
        self.special_token_ids = [i for i in ids if plain.is_special_token(i) and i not in text]

    def __call__(self, text: Any) -> list[int]:
        """Ids of a text."""
        said = text.decode(errors="replace") if isinstance(text, bytes) else text
        return list(self._backend.encode(said, add_special_tokens=False).ids)


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
