"""Between text and token ids: prompts and chats in, text without half characters or stop strings out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from acttail.errors import ActTailError
from acttail.model.tokenizing import asking

# What a tokenizer's clean-up of spaces may still change at the end of a text: the patterns it replaces one
# after the other (" .", " ' ", " n't" ...) have 29 characters together.
_CLEANED = 29


# Tokens that end a turn under whatever id a vocabulary has them (llama.cpp's list, llama-vocab.cpp).
_TURN_ENDS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
    "<|end_of_text|>", "<EOT>", "_<EOT>", "<|eot|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>", "<turn|>",
)  # fmt: skip


def turn_ends(tokenizer: Any) -> frozenset[int]:
    """Ids of a tokenizer's end-of-turn tokens, told by their names."""
    if tokenizer is None:
        return frozenset()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in _TURN_ENDS}
    # An unknown name has the id of another token, or none.
    known = {
        name: int(i)
        for name, i in ids.items()
        if isinstance(i, int) and tokenizer.convert_ids_to_tokens(i) == name
    }
    if {"<|return|>", "<|call|>"} <= set(known):
        known.pop("<|end|>", None)  # harmony's: a message ends, the turn goes on
    return frozenset(known.values())


def eos_of(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a sequence: the model's own, the tokenizer's, and its ends of a turn."""
    found = getattr(generation_config, "eos_token_id", None)
    ids = found if isinstance(found, list | tuple) else [found]
    ids = [*ids, getattr(tokenizer, "eos_token_id", None)]
    return frozenset(int(i) for i in ids if isinstance(i, int)) | turn_ends(tokenizer)


def encode(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Token ids [n] int64 of a text.

    Args:
        tokenizer: of transformers, or None.
        prompt: the text.

    Raises:
        ActTailError: there is no tokenizer, it fails, or the prompt is empty.
    """
    with asking(tokenizer):
        ids = tokenizer(prompt)["input_ids"]
    return _ids(ids)


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> torch.Tensor:
    """Token ids [n] int64 of a conversation, ready for the assistant's answer.

    Args:
        tokenizer: of transformers, or None.
        messages: with ``role`` and ``content``, as the tokenizer's chat template takes them.

    Raises:
        ActTailError: there is no tokenizer or no chat template, the template refuses the messages, or one of them
            fails.
    """
    with asking(tokenizer):
        if not getattr(tokenizer, "chat_template", None):
            raise ActTailError("this model has no chat template")
        ids = tokenizer.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=True, return_dict=True
        )["input_ids"]
    return _ids(ids)


def _ids(ids: list[int]) -> torch.Tensor:
    if not ids:
        raise ActTailError("the prompt is empty")
    return torch.tensor(ids, dtype=torch.int64)


class TextStream:
    """Turns ids into text as they come, never half a character and never a part of a stop string.

    Args:
        tokenizer: of transformers.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
        self._cleans = _cleans(tokenizer)
        self._ids: list[int] = []
        # Ids of the text that came last; those after them are held back.
        self._begin = self._end = 0
        self._raw = ""
        self.text = ""
        self._sent = 0
        self.stopped = False

    def push(self, token: int, *, last: bool = False) -> str:
        """Add a token; returns what may be shown now."""
        self._ids.append(token)
        return self._advance(last=last)

    def finish(self) -> str:
        """What was held back."""
        return self._advance(last=True)

    def _decode(self, ids: list[int]) -> str:
        # Clean-up takes back spaces that were there a token ago; it is done on the whole text.
        extra = {"clean_up_tokenization_spaces": False} if self._cleans else {}
        with asking(self._tokenizer):
            return str(self._tokenizer.decode(ids, skip_special_tokens=True, **extra))

    def _advance(self, *, last: bool) -> str:
        if self.stopped:
            return ""
        # A token's text may depend on the one before it, so it is decoded together with those whose text
        # came last: they begin with a whole character, as a fixed number of tokens might not.
        before = self._decode(self._ids[self._begin : self._end])
        now = self._decode(self._ids[self._begin :])
        if now.endswith("\ufffd") and not last:
            return ""
        new = now[len(before) :]
        self._raw += new
        self.text = self._tokenizer.clean_up_tokenization(self._raw) if self._cleans else self._raw
        if new:
            self._begin = self._end
        self._end = len(self._ids)
        settled = len(self.text) - (_CLEANED if self._cleans and not last else 0)
        for stop in self._stop:
            at = self.text.find(stop, max(0, self._sent - len(stop)), max(0, settled))
            if at >= 0:
                self.text, self.stopped = self.text[:at], True
                settled = at
        if not (last or self.stopped):
            settled -= self._possible_stop(self.text[: max(0, settled)])
        piece = self.text[self._sent : max(settled, self._sent)]
        self._sent = max(settled, self._sent)
        return piece

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of a text that could begin a stop string."""
        longest = 0
        for stop in self._stop:
            for n in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:n]):
                    longest = max(longest, n)
                    break
        return longest


def _cleans(tokenizer: Any) -> bool:
    """Whether decoding takes out spaces afterwards; transformers never does so for BPE."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return type(model).__name__ != "BPE" or bool(getattr(tokenizer, forced, False))
