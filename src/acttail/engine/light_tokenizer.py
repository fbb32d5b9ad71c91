"""A tokenizer that encodes, decodes and fills chat templates without transformers.

transformers takes a second to import and another to make a tokenizer of a large vocabulary; tokenizers' own JSON
and jinja do the same work. It is read from beside packed weights, or made of a GGUF's header where its kind is known
(:mod:`acttail.model.gguf_tokenizer`). What is kept of transformers' is compared with its answers when it is written,
and is not written where it differs; anything else that is asked of it is asked of transformers' tokenizer, loaded then.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Len

from acttail.base.files import write_json, write_text
from acttail.base.schema import STRICT, Count, Name, SchemaError, checked, read_json
from acttail.errors import ActTailError
from acttail.model.gguf_header import Header
from acttail.model.gguf_tokenizer import tokenizer_of

FILE = "light_tokenizer.json"
_GENERATION = re.compile(r"\{%-?\+?\s*generation\b")
_PROBES = (
    "Hello, world! It's 12.50, naïve: 你好 🙂\n\n\tdef f(x):  return x ** 2",
    " two  spaces ", "<s>[INST] x </s>",
)  # fmt: skip
_USER = {"role": "user", "content": "Say 'hi' & <leave>."}
_CHATS = (
    [_USER],
    [_USER, {"role": "assistant", "content": "hi"}, _USER],
    [{"role": "system", "content": "Be brief."}, _USER],
)


@dataclass(frozen=True)
class Kept:
    """What the file holds; the annotations are its schema.

    Attributes:
        chat_template: the tokenizer's, None if it has none.
        eos_token_id: that ends a sequence, None if none does.
        variables: special tokens by their names in the template.
        light_chat: whether the template needs nothing of transformers.
    """

    __pydantic_config__ = STRICT

    chat_template: Annotated[str, Len(0, 1 << 20)] | None
    eos_token_id: Count | None
    variables: dict[Name, Annotated[str, Len(0, 1 << 16)]]
    light_chat: bool


class Encoded(dict[str, list[int]]):
    """Token ids under ``input_ids``, as a key and as an attribute."""

    @property
    def input_ids(self) -> list[int]:
        """The ids."""
        return self["input_ids"]


class LightTokenizer:
    """Does what an engine asks of transformers' tokenizer.

    Args:
        backend: of tokenizers.
        kept: what :func:`write_light` writes.
        whole: makes transformers' own.
    """

    # Its tokens end in no clean-up of spaces: others are not kept.
    clean_up_tokenization_spaces = False

    def __init__(self, backend: Any, kept: "Kept", whole: Callable[[], Any]) -> None:
        self._backend, self._kept, self._make_whole = backend, kept, whole
        self._backend.no_truncation()
        self._backend.no_padding()
        self.chat_template, self.eos_token_id = kept.chat_template, kept.eos_token_id
        self._variables, self._light_chat = kept.variables, kept.light_chat

    @property
    def backend_tokenizer(self) -> Any:
        """Of the tokenizers library, as transformers' own has it."""
        return self._backend

    def __call__(self, text: Any, **named: Any) -> Any:
        """Token ids of a text; whatever else is asked is transformers' to answer."""
        if named or not isinstance(text, str):
            return self._whole(text, **named)
        return Encoded(input_ids=self._backend.encode(text).ids)

    def decode(self, ids: Any, skip_special_tokens: bool = False, **named: Any) -> Any:
        """Text of token ids."""
        if named:
            return self._whole.decode(ids, skip_special_tokens=skip_special_tokens, **named)
        plain = [int(i) for i in ids] if isinstance(ids, Iterable) else [int(ids)]
        return self._backend.decode(plain, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **named: Any) -> Any:
        """Token ids of a conversation, as transformers gives them."""
        if not self._light_chat or named != {"add_generation_prompt": True, "return_dict": True}:
            return self._whole.apply_chat_template(messages, **named)
        text = self._template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._variables
        )  # fmt: skip
        return Encoded(input_ids=self._backend.encode(text, add_special_tokens=False).ids)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Id of a token, None or the unknown token's where there is none; of a list, those of all."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(t) for t in tokens]
        found = self._backend.token_to_id(tokens)
        if found is None and "unk_token" in self._variables:
            return self._backend.token_to_id(self._variables["unk_token"])
        return found

    def convert_ids_to_tokens(self, ids: Any, **named: Any) -> Any:
        """Token of an id; of a list, those of all."""
        if named:
            return self._whole.convert_ids_to_tokens(ids, **named)
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        return [self._backend.id_to_token(int(i)) for i in ids]

    def save_pretrained(self, folder: Any) -> None:
        """Write what :func:`read_light` reads, and what transformers' own is made of."""
        place = Path(folder)
        self._backend.save(str(place / "tokenizer.json"), pretty=False)
        write_json(
            place / "tokenizer_config.json",
            {
                "backend": "tokenizers",
                "tokenizer_class": "TokenizersBackend",
                "clean_up_tokenization_spaces": False,
            }
            | self._variables,
        )
        if self.chat_template is not None:
            write_text(place / "chat_template.jinja", self.chat_template)
        write_json(place / FILE, asdict(self._kept))

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._whole, name)

    @cached_property
    def _whole(self) -> Any:
        """Transformers' own."""
        return self._make_whole()

    @cached_property
    def _template(self) -> Any:
        """The chat template, compiled as transformers compiles it."""
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **named: Any) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **named)

        made = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        made.filters["tojson"] = tojson
        made.globals["raise_exception"] = refuse
        made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return made.from_string(self.chat_template or "")


def write_light(folder: Path, tokenizer: Any) -> bool:
    """Keep what :class:`LightTokenizer` needs beside a tokenizer that is saved there already.

    Args:
        folder: where ``save_pretrained`` wrote.
        tokenizer: of transformers.

    Returns:
        Whether it does the same as the tokenizer; if not, nothing is written.
    """
    special = getattr(tokenizer, "special_tokens_map", None)
    template = getattr(tokenizer, "chat_template", None)
    if not (
        getattr(tokenizer, "is_fast", False)
        and (folder / "tokenizer.json").is_file()
        and not getattr(tokenizer, "clean_up_tokenization_spaces", False)
        and isinstance(special, dict)
        and isinstance(template, str | None)
    ):
        return False
    variables = {k: v for k, v in special.items() if isinstance(v, str)}
    kept = Kept(template, tokenizer.eos_token_id, variables, light_chat=True)
    light = _of_folder(folder, kept)
    try:
        if not _same_text(light, tokenizer):
            return False
    except Exception:
        # One that cannot read every text is left as it is; tokenizers raises Exception itself.
        return False
    same = template is not None and all(_chat(light, c) == _chat(tokenizer, c) for c in _CHATS)
    write_json(folder / FILE, asdict(replace(kept, light_chat=same)))
    return True


def read_light(folder: Path) -> LightTokenizer | None:
    """The tokenizer that :func:`write_light` kept in a folder, if it did.

    Raises:
        ActTailError: it is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return _of_folder(folder, checked(Kept, read_json(path, "a kept tokenizer")))
    except SchemaError as error:
        raise ActTailError(
            f"{path} is not a kept tokenizer: {error}; convert the model again"
        ) from None


def light_from_header(header: Header, whole: Callable[[], Any]) -> LightTokenizer | None:
    """The tokenizer of a GGUF's header, if it is of a kind that is known to be as transformers makes it.

    Args:
        header: of the file.
        whole: makes transformers' own.
    """
    found = tokenizer_of(header)
    if found is None:
        return None
    template = found.chat_template
    # Marks of what an assistant said are an extension of transformers'.
    light_chat = template is not None and _GENERATION.search(template) is None
    kept = Kept(template, found.eos_token_id, dict(found.special), light_chat=light_chat)
    return LightTokenizer(found.backend, kept, whole)


def _of_folder(folder: Path, kept: "Kept") -> LightTokenizer:
    from tokenizers import Tokenizer

    def whole() -> Any:
        from transformers import AutoTokenizer

        from acttail.model.hf import quiet_transformers

        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder)

    return LightTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")), kept, whole)


def _same_text(light: LightTokenizer, tokenizer: Any) -> bool:
    for probe in _PROBES:
        ids = tokenizer(probe)["input_ids"]
        if light(probe)["input_ids"] != ids:
            return False
        for skip in (False, True):
            if light.decode(ids, skip_special_tokens=skip) != tokenizer.decode(
                ids, skip_special_tokens=skip
            ):
                return False
    return True


def _chat(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    """Ids of a conversation, or what refuses it."""
    try:
        found = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
    except Exception as error:
        return type(error), str(error)
    return list(found["input_ids"])
