"""Text that comes out piece by piece is the tokenizer's own, whatever its kind and whatever the text."""

import functools
import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from acttail.engine.text import TextStream, eos_of, turn_ends

CORPUS = [
    "The quick brown fox doesn't jump over the lazy dog; it's asleep, isn't it?",
    "naïve café façade – “quoted” … 12,345.67 €",
    "你好世界 こんにちは世界 안녕하세요 세계",
    "🙂🙂👍🏽👩‍👩‍👧‍👦🇩🇪",
    "é á ü ก็ हिन्दी",
] * 4
# What goes wrong goes wrong at the borders: of characters of 1 to 4 bytes, of marks, of spaces.
ALPHABET = st.one_of(
    st.sampled_from(list(" \n'.,?!abtsnvre" + "".join(dict.fromkeys("".join(CORPUS))))),
    st.sampled_from(["\u0301", "\u200d", "\ufe0f", "🏽", "👨‍👩‍👧", " n't", " ' ", " 's", "\ufffd"]),
    st.characters(exclude_categories=["Cs", "Cc"]),
)
TEXTS = st.lists(ALPHABET, max_size=24).map("".join)


def wrapped(raw, **more):
    return PreTrainedTokenizerFast(tokenizer_object=raw, **more)


def byte_level():
    """As GPT-2's, Qwen's and Llama 3's: merges that end inside a character."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
    )
    raw.train_from_iterator(CORPUS, trainer)
    # Llama 3's config says so too, and transformers does not do it for BPE.
    return wrapped(raw, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=True)


def byte_fallback(decoder):
    words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "n", "好", "▁a", "▁b"]
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    raw = Tokenizer(
        models.BPE(
            vocabulary,
            [("▁", "a"), ("▁", "b")],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    raw.decoder = decoder
    return raw


def gemma():
    raw = byte_fallback(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    )
    raw.normalizer = normalizers.Replace(" ", "▁")
    return wrapped(raw)


def llama2():
    """The space before a text is put there by the tokenizer and taken away again."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw = byte_fallback(decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)]))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return wrapped(raw)


def unigram():
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return wrapped(raw, unk_token="<unk>")


def word_piece(**more):
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece(cleanup=not more)
    raw.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"])
    )
    return wrapped(raw, unk_token="[UNK]", **more)


KINDS = {
    "byte-level": byte_level,
    "gemma": gemma,
    "llama2": llama2,
    "unigram": unigram,
    "word-piece": word_piece,
    "word-piece-cleaned": functools.partial(word_piece, clean_up_tokenization_spaces=True),
}
made = functools.cache(lambda kind: KINDS[kind]())


def streamed(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    out = []
    for token in ids:
        out.append(stream.push(token))
        if stream.stopped:
            return out, stream
    return [*out, stream.finish()], stream


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(text=TEXTS)
@example(text="你好世界你好世界 🙂🙂🙂 ééé")
@example(text="a👩‍👩‍👧‍👦b 👍🏽 हिन्दी ก็")
@example(text="it doesn ' t , it 's a . b n't ' m")
@example(text="  a  b ")
def test_any_text_streams_as_the_tokenizer_decodes_it(kind, text):
    tokenizer = made(kind)
    ids = ids_of(tokenizer, text)
    out, stream = streamed(tokenizer, ids)
    assert "".join(out) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["byte-level", "gemma", "llama2"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_nothing_shown_is_half_a_character(kind, text):
    tokenizer = made(kind)
    out, _ = streamed(tokenizer, ids_of(tokenizer, text.replace("\ufffd", "")))
    assert not any("\ufffd" in piece for piece in out)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=TEXTS, at=st.integers(0, 20), length=st.integers(1, 4))
def test_text_ends_where_a_stop_string_first_stands(kind, text, at, length):
    tokenizer = made(kind)
    ids = ids_of(tokenizer, text)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    stop = whole[at : at + length]
    if not stop or "\ufffd" in stop:
        return
    out, stream = streamed(tokenizer, ids, [stop])
    assert stream.stopped
    assert "".join(out) == stream.text == whole[: whole.find(stop)]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_between_have_no_text(kind):
    tokenizer = made(kind)
    special = tokenizer.all_special_ids
    draw = random.Random(0)
    for text in CORPUS[:5]:
        ids = ids_of(tokenizer, text)
        if special:
            at = draw.randrange(len(ids) + 1)
            ids[at:at] = special[:1]
        out, stream = streamed(tokenizer, ids)
        assert "".join(out) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)


def with_tokens(*names):
    raw = Tokenizer(models.BPE())
    tokenizer = wrapped(raw, eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    return tokenizer


def test_turns_end_by_their_tokens_names():
    for name in (
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<|end|>",
        "<|endoftext|>",
        "<|eom_id|>",
    ):
        tokenizer = with_tokens("<|other|>", name)
        assert turn_ends(tokenizer) == {tokenizer.convert_tokens_to_ids(name)}
        assert eos_of(None, tokenizer) == {*turn_ends(tokenizer), tokenizer.eos_token_id}
    assert turn_ends(with_tokens("<|other|>")) == turn_ends(None) == frozenset()
    unknown = wrapped(
        Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), unk_token="[UNK]"
    )
    assert turn_ends(unknown) == frozenset()  # every name has the unknown token's id


def test_a_message_of_harmony_is_no_turn():
    tokenizer = with_tokens("<|return|>", "<|call|>", "<|end|>")
    assert turn_ends(tokenizer) == set(tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"]))


def test_the_list_of_a_generation_config_counts():
    from transformers import GenerationConfig

    assert eos_of(GenerationConfig(eos_token_id=[3, 5]), None) == {3, 5}
    assert eos_of(GenerationConfig(eos_token_id=3), None) == {3}
