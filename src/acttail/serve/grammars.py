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

    def matcher(self, grammar: Grammar) -> "Matcher":
        """What holds an answer to a grammar; takes a second or two the first time.

        Raises:
            ActTailError: llguidance is not there, or cannot use this grammar or this tokenizer.
        """
        param = grammar.param
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise ActTailError(
                f"{param} needs llguidance, which this server lacks: pip install 'acttail[structured]'"
            ) from error
        with self._lock:
            if self._tokens is None:
                self._tokens = _tokens(self._engine, param)
        matcher = LLMatcher(self._tokens, grammar.text, log_level=0)
        if not matcher.is_error():
            return Matcher(matcher)
        for where, schema in grammar.schemas.items():
            alone = LLMatcher(self._tokens, grammar_of_schema(schema).text, log_level=0)
            if alone.is_error():
                raise ActTailError(f"{where}: the schema cannot be used: {_reason(alone)}")
        raise ActTailError(f"{param}: the schemas cannot be used together: {_reason(matcher)}")


def _reason(matcher: Any) -> str:
    """What llguidance says is wrong, without the grammar, which is not the client's."""
    said = str(matcher.get_error())
    return said.partition("failed to compile JSON schema: ")[2].partition("\n   1 | ")[0] or said


def _tokens(engine: Engine, param: str) -> Any:
    """A model's tokens for llguidance."""
    from llguidance import LLTokenizer, TokenizerWrapper

    tokenizer = engine.tokenizer
    eos = sorted(engine.eos) or [tokenizer.eos_token_id]
    try:
        described = tokenizer.backend_tokenizer.to_str()
        plain = LLTokenizer(described, n_vocab=engine.vocabulary, eos_token=eos)
        wrapped = TokenizerWrapper(_Tokens(plain, described, eos[0]))
        return LLTokenizer(wrapped, n_vocab=engine.vocabulary, eos_token=eos)
    except (AttributeError, ValueError, TypeError) as error:
        raise ActTailError(f"{param} does not work with this model's tokenizer: {error}") from error


class _Tokens:
    """A tokenizer as llguidance takes one that it does not know.

    By itself it takes every added token that looks like a tag for a special one, which no text has. Models write
    ``<tool_call>`` and ``<think>`` by such tokens, and they are text to everybody else.

    Args:
        plain: llguidance's own view of the tokens.
        described: the tokenizer as tokenizers writes it.
        eos: the token that ends a text.
    """

    def __init__(self, plain: Any, described: str, eos: int) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(described)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_token_id, self.bos_token_id = eos, None
        added = self._backend.get_added_tokens_decoder()
        text = {i: t.content.encode() for i, t in added.items() if not t.special}
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
