"""A tokenizer from a GGUF's header by the tokenizers library alone, equal to the one that transformers makes of it.

transformers takes one to two seconds to import, and makes a slow class around the same library. The kinds here are
byte-level BPE, Gemma's and Llama's; tests hold each to transformers' own, by its JSON. Others are left to transformers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from acttail.errors import ModelError, reason
from acttail.model.gguf_header import Header

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Special tokens by transformers' names, and what the header calls their ids.
_SPECIAL = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding",
}  # fmt: skip
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
_BYTE_LEVEL_OF = frozenset({"llama", "qwen2", "qwen3"})
_GEMMA_OF = frozenset({"gemma2", "gemma3"})


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer and what transformers would know beside it.

    Attributes:
        backend: the tokenizer.
        special: transformers' name of a special token -> the token.
        eos_token_id: of the token that ends a sequence, or None.
        chat_template: in jinja, or None.
    """

    backend: "Tokenizer"
    special: Mapping[str, str]
    eos_token_id: int | None
    chat_template: str | None


def tokenizer_of(header: Header) -> GgufTokenizer | None:
    """The tokenizer that a header describes; None if it is of no kind that is known here.

    Raises:
        ModelError: a text of it is not UTF-8, or its parts do not belong together.
    """
    parts = _parts(header)
    template = header.get("tokenizer.chat_template")
    if parts is None or parts.pre in _OTHER_SPLITS or not isinstance(template, str | None):
        return None
    special = dict(parts.special)
    if parts.architecture in _GEMMA_OF:
        special |= {"mask_token": "<mask>"}
    try:
        backend = _backend(parts)
        if backend is None:
            return None
        _add_special(backend, special.values())
        _post_process(backend, parts)
    except Exception as error:  # tokenizers raises Exception itself, of a merge of no token, say
        raise ModelError(
            f"cannot read the tokenizer of {header.path}: {reason(error)}; fetch it again"
        ) from error
    return GgufTokenizer(backend, special, header.get("tokenizer.ggml.eos_token_id"), template)


@dataclass(frozen=True)
class _Parts:
    """What a header says of a tokenizer, checked."""

    architecture: str
    kind: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[tuple[str, str]] | None
    special: dict[str, str]
    add_bos: bool
    add_eos: bool


def _parts(header: Header) -> _Parts | None:
    def get(key: str) -> Any:
        return header.get(f"tokenizer.ggml.{key}")

    tokens, types, scores = get("tokens"), get("token_type"), get("scores")
    if not (isinstance(tokens, list) and tokens and isinstance(tokens[0], str)):
        return None
    if not (isinstance(types, list) and len(types) == len(tokens) == len(set(tokens))):
        return None
    if scores is not None and not (isinstance(scores, list) and len(scores) == len(tokens)):
        return None
    merges = get("merges")
    if merges is not None:
        if not (isinstance(merges, list) and all(isinstance(m, str) for m in merges[:1])):
            return None
        merges = [tuple(m.split(" ")) for m in merges]
        if any(len(m) != 2 for m in merges):
            return None
    special: dict[str, str] = {}
    for name, key in _SPECIAL.items():
        index = get(f"{key}_token_id")
        if index is not None:
            if type(index) is not int or not 0 <= index < len(tokens):
                return None
            special[name] = tokens[index]
    kind = str(get("model"))
    add_bos = get("add_bos_token")
    return _Parts(
        str(header.get("general.architecture")), kind, get("pre"), tokens, types, scores, merges, special,
        bool(kind == "llama" if add_bos is None else add_bos), bool(get("add_eos_token")),
    )  # fmt: skip


def _backend(parts: _Parts) -> "Tokenizer | None":
    """The tokenizer with its special tokens; None if it is of no known kind."""
    if parts.kind == "gpt2" and parts.architecture in _BYTE_LEVEL_OF and parts.merges is not None:
        return _byte_level(parts, parts.merges)
    if parts.kind == "llama" and parts.architecture in _GEMMA_OF and parts.merges is None:
        return _gemma(parts)
    if parts.kind == "llama" and parts.architecture == "llama" and (parts.merges or parts.scores):
        return _llama(parts)
    return None


def _byte_level(parts: _Parts, merges: list[tuple[str, str]]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    spelling = _spelling()
    alphabet = set(spelling.values())
    vocabulary = {
        t if alphabet.issuperset(t) else "".join(spelling[b] for b in t.encode()): i
        for i, t in enumerate(parts.tokens)
    }
    made = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False
        )
    )  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    _add_special(made, ["<|endoftext|>"])
    # A control token that is not spelled in bytes is one that llama.cpp took for one.
    _add_of_file(made, parts, lambda token: alphabet.issuperset(token))
    return _split(made, parts)


def _gemma(parts: _Parts) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens = [_SPACE * len(t) if " " in t and not t.strip() else t for t in parts.tokens]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    # Gemma's merges go by the places of what they make, whatever its score.
    merges = [pair for t in tokens for pair in _halves(t, vocabulary)]
    made = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            fuse_unk=True,
            byte_fallback=True,
            unk_token="<unk>",  # noqa: S106 - a token of the vocabulary
        )
    )
    made.normalizer = normalizers.Replace(" ", _SPACE)
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous", invert=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_special(made, ["<unk>", "<bos>", "<eos>", "<pad>", "<mask>"])
    _add_of_file(made, parts)
    return _split(made, parts)


def _llama(parts: _Parts) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {t: i for i, t in enumerate(parts.tokens)}
    merges = parts.merges
    if merges is None:
        assert parts.scores is not None  # noqa: S101  (of _backend)
        scored = [
            ((score, len(pair[0]), len(pair[1])), pair)
            for t, score in zip(parts.tokens, parts.scores, strict=True)
            for pair in _halves(t, vocabulary)
        ]
        scored.sort(key=lambda item: item[0], reverse=True)
        merges = [pair for _, pair in scored]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([
        decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1),
    ])  # fmt: skip
    _add_special(made, ["<unk>", "<s>", "</s>"])
    _add_of_file(made, parts)
    return _split(made, parts)


def _halves(token: str, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of tokens that make up a token, the longest first half first."""
    return [
        (token[:i], token[i:])
        for i in range(len(token) - 1, 0, -1)
        if token[i:] in vocabulary and token[:i] in vocabulary
    ]


def _add_special(made: "Tokenizer", tokens: Iterable[str]) -> None:
    from tokenizers import AddedToken

    known = {t.content for t in made.get_added_tokens_decoder().values()}
    new = [t for t in dict.fromkeys(tokens) if t not in known]
    if new:
        made.add_tokens([AddedToken(t, special=True) for t in new])


def _add_of_file(made: "Tokenizer", parts: _Parts, spelled: Any = None) -> None:
    """Control tokens as special ones, those that users defined as others: both are never cut."""
    from tokenizers import AddedToken

    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        new = [
            t
            for t, k in zip(parts.tokens, parts.types, strict=True)
            if k == kind
            and (made.token_to_id(t) is not None if not special else spelled is None or spelled(t))
        ]
        if new:
            made.add_tokens([AddedToken(t, normalized=False, special=special) for t in new])


def _split(made: "Tokenizer", parts: _Parts) -> "Tokenizer":
    """Cut texts as the vocabulary was learned, where the file names a way."""
    from tokenizers import Regex, pre_tokenizers

    pattern = SPLITS.get(parts.pre or "")
    if pattern is not None:
        made.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    return made


def _post_process(made: "Tokenizer", parts: _Parts) -> None:
    """Put the tokens around a text that the file asks for."""
    from tokenizers import processors

    bos = parts.special.get("bos_token") if parts.add_bos else None
    eos = parts.special.get("eos_token") if parts.add_eos else None
    around = [t for t in (bos, eos) if t is not None]

    def one(sequence: str, part: int) -> str:
        begin, end = f"{bos}:{part} " if bos else "", f" {eos}:{part}" if eos else ""
        return f"{begin}${sequence}:{part}{end}"

    made.post_processor = processors.TemplateProcessing(
        single=one("A", 0), pair=f"{one('A', 0)} {one('B', 1)}",
        special_tokens=[(t, made.token_to_id(t)) for t in around],
    )  # fmt: skip


def _spelling() -> dict[int, str]:
    """How byte-level BPE spells bytes: printable ones as themselves, the others from 256 on (GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# tokenizer.ggml.pre -> the pattern that texts are cut by (llama.cpp's llama-vocab.cpp); GPT-2's for other names.
SPLITS = {
    **dict.fromkeys((
        "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
        "dbrx", "smaug-bpe",
    ), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), _QWEN2),
}  # fmt: skip
# Names whose patterns are left to transformers.
_OTHER_SPLITS = frozenset(
    {"tekken", "qwen35", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"}
)
