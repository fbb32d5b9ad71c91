"""From a request's text to token ids: off the event loop, within a deadline, a user's text as plain text."""

import asyncio
import contextlib
import ctypes
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError

from acttail.engine import Engine
from acttail.errors import ActTailError
from acttail.serve.call_form import CallForm
from acttail.serve.errors import ApiError
from acttail.serve.tool_prompts import ToolPrompts

_T = TypeVar("_T")
# Texts read at once: a slow one delays one other at most, and the event loop never.
_AT_ONCE = 2


class _Late(SystemExit):
    """Raised inside a thread whose time is over; threading takes a SystemExit for a quiet end."""


class Prompting:
    """Tokenises and applies chat templates for one server.

    Args:
        engine: with a tokenizer.
        seconds: that one text may take, its wait included.
        special_tokens: whether a message's content may hold special tokens; plain text else.
    """

    def __init__(self, engine: Engine, *, seconds: float, special_tokens: bool = False) -> None:
        self._engine, self._tokenizer = engine, engine.tokenizer
        self._seconds, self._parse = seconds, special_tokens
        self._turn: asyncio.Semaphore | None = None
        self._tools: tuple[Any, ToolPrompts] | None = None

    async def text(self, prompt: str | Sequence[int]) -> torch.Tensor:
        """Token ids [n] int64 of a prompt; ids are checked and taken as they are.

        Raises:
            ApiError: it is empty, takes too long, or names a token that there is not.
        """
        if not isinstance(prompt, str):
            return self.checked(prompt, "prompt")
        return await self.run(lambda: self._engine.encode(prompt), "prompt")

    async def bare(self, text: str, *, special: bool) -> torch.Tensor:
        """Token ids [n] int64 of a text as it stands, which may be empty.

        Args:
            text: that is tokenised.
            special: add the tokens that the tokenizer begins and ends a text with.
        """
        ids = await self.run(
            lambda: list(self._tokenizer(text, add_special_tokens=special)["input_ids"]), "content"
        )
        return torch.tensor(ids, dtype=torch.int64)

    def checked(self, ids: Sequence[int], param: str) -> torch.Tensor:
        """Token ids [n] int64, if the model has them all.

        Raises:
            ApiError: one is not in the vocabulary.
        """
        for token in ids:
            if token >= self._engine.vocabulary:
                raise ApiError(
                    400, f"{param}: there is no token {token}; ids are from 0 to {self._engine.vocabulary - 1}",
                    param=param,
                )  # fmt: skip
        return torch.tensor(list(ids), dtype=torch.int64)

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any], *, goes_on: bool = False,
        answer: bool = True, tools: Sequence[Mapping[str, Any]] = (),
    ) -> torch.Tensor:  # fmt: skip
        """Token ids [n] int64 of a conversation.

        Args:
            messages: as chat templates take them.
            arguments: further variables of the template.
            tools: as chat templates take them; shown to the model.
            goes_on: leave the last message open, for the model to go on with it.
            answer: begin the assistant's answer.

        Raises:
            ApiError: the template fails on the messages, knows no such variable, or takes too long.
        """
        template = self._template()
        for name in arguments:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise ApiError(
                    400, f"{name}: this model's chat template has no such variable; leave it out", param=name
                )  # fmt: skip
        return await self.run(
            lambda: self._chat(messages, arguments, tools, goes_on=goes_on, answer=answer),
            "messages",
        )

    async def call_form(self) -> CallForm:
        """How the model writes calls of tools.

        Raises:
            ApiError: the model has no chat template, or it takes too long.
        """
        self._template()
        return await self.run(lambda: self._tool_prompts().form, "tools")

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones shown.

        Raises:
            ApiError: one is not in the vocabulary.
        """
        self.checked(ids, "tokens")
        return await self.run(lambda: str(self._tokenizer.decode(list(ids))), "tokens")

    def _template(self) -> str:
        found = getattr(self._tokenizer, "chat_template", None)
        if not found:
            raise ApiError(
                400, "this model has no chat template; use /v1/completions", param="messages"
            )
        return " ".join(found.values()) if isinstance(found, dict) else str(found)

    def _chat(
        self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]], *, goes_on: bool, answer: bool,
    ) -> torch.Tensor:  # fmt: skip
        # A text that is no part of any message stands for each special token in one, so that the template
        # sees the messages whole and the tokenizer sees no special token there.
        mark = f"\ue000{secrets.token_hex(8)}:"
        (plain, shown), found = self._masked([list(messages), list(tools)], mark)
        more: Mapping[str, Any] = {}
        if shown or any("tool_calls" in m or m["role"] == "tool" for m in messages):
            plain, more = self._tool_prompts().prepared(plain, shown)
        try:
            text = self._tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=answer and not goes_on,
                continue_final_message=goes_on, **more, **arguments,
            )  # fmt: skip
        except TemplateError as error:
            raise ActTailError(f"the chat template refuses the messages: {error}") from error
        except Exception as error:
            # A template is a program that the model brings: whatever it fails with, these messages are why.
            raise ActTailError(
                f"the chat template fails on these messages: {type(error).__name__}: {error}"
            ) from error
        ids: list[int] = []
        for i, part in enumerate(re.split(f"{mark}([0-9]+)\ue001", text)):
            if i % 2:
                ids += self._as_plain(found[int(part)])
            elif part:
                ids += self._plain_ids(part)
        if not ids:
            raise ActTailError("the prompt is empty")
        return torch.tensor(ids, dtype=torch.int64)

    def _tool_prompts(self) -> ToolPrompts:
        """What the chat template makes of tools, tried once."""
        template = self._tokenizer.chat_template
        if self._tools is None or self._tools[0] != template:

            def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
                shown = {"tools": tools} if tools else {}
                return str(
                    self._tokenizer.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=False, **shown
                    )
                )

            self._tools = template, ToolPrompts(render, self._special_names())
        return self._tools[1]

    def _masked(self, data: Any, mark: str) -> tuple[Any, list[str]]:
        """Messages and tools with the special tokens in them replaced, and those that were."""
        found: list[str] = []
        special = self._special()
        if self._parse or special is None:
            return data, found

        def stand_in(match: re.Match[str]) -> str:
            found.append(match[0])
            return f"{mark}{len(found) - 1}\ue001"

        def masked(value: Any) -> Any:
            if isinstance(value, str):
                return special.sub(stand_in, value)
            if isinstance(value, Mapping):
                # Templates and tokenizers know roles by name.
                return {masked(k): v if k == "role" else masked(v) for k, v in value.items()}
            return [masked(v) for v in value] if isinstance(value, list) else value

        return masked(data), found

    def _special_names(self) -> list[str]:
        """Names of special tokens, the longest first."""
        added = getattr(self._tokenizer, "added_tokens_decoder", None) or {}
        names = {str(t) for t in added.values() if getattr(t, "special", False)}
        names |= set(self._tokenizer.all_special_tokens)
        return sorted(filter(None, names), key=len, reverse=True)

    def _special(self) -> "re.Pattern[str] | None":
        ordered = self._special_names()
        return re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def _plain_ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _as_plain(self, name: str) -> list[int]:
        """Ids of a special token's name as text: in two halves it is none, or letter by letter."""
        special = set(self._tokenizer.all_special_ids)
        for parts in ((name[:1], name[1:]), tuple(name)):
            ids = [i for part in parts if part for i in self._plain_ids(part)]
            if not special & set(ids):
                break
        return [i for i in ids if i not in special]

    async def run(self, work: Callable[[], _T], param: str) -> _T:
        """What `work` returns, from a thread of its own that ends when its time is over."""
        turn = self._turn = self._turn or asyncio.Semaphore(_AT_ONCE)
        late = ApiError(
            400, f"{param}: reading the text took longer than {self._seconds:g} s; send less", param=param
        )  # fmt: skip
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            await asyncio.wait_for(turn.acquire(), self._seconds)
        except asyncio.TimeoutError:
            raise late from None
        done: asyncio.Future[_T] = loop.create_future()

        def tell(value: _T | None, error: BaseException | None) -> None:
            if done.done():
                return
            turn.release()
            if error is None:
                done.set_result(value)  # type: ignore[arg-type]
            else:
                done.set_exception(error)

        def body() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                try:
                    value, error = None, None
                    try:
                        value = work()
                    except Exception as found:
                        error = found
                    loop.call_soon_threadsafe(tell, value, error)
                except _Late:  # sent once, so nothing cuts this short
                    loop.call_soon_threadsafe(tell, None, late)

        thread = threading.Thread(target=body, name="acttail-prompt", daemon=True)
        thread.start()
        try:
            return await asyncio.wait_for(
                asyncio.shield(done), self._seconds - (loop.time() - begun)
            )
        except asyncio.TimeoutError:
            done.add_done_callback(lambda f: f.exception())  # nobody waits for it any more
            _interrupt(thread)
            raise late from None
        except ActTailError as error:
            raise ApiError(400, str(error), param=param) from error
        except (ValueError, TypeError, OverflowError) as error:
            # A tokenizer's own complaint about a text.
            raise ApiError(
                400, f"{param}: the tokenizer refuses it: {error}", param=param
            ) from error


def _interrupt(thread: threading.Thread) -> None:
    """End a thread at its next Python instruction: a template's loop is Python, however deep."""
    if thread.ident is not None and thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(_Late)
        )
