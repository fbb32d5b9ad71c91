"""Fields of OpenAI's API and of other servers that this one does not serve: refused by name, never ignored."""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

# Field -> what to do instead. A value that asks for nothing (null, false, empty, 0, "none", "auto") passes.
_REFUSED: Mapping[str, str] = {
    "functions": "use tools on /v1/chat/completions",
    "function_call": "use tool_choice on /v1/chat/completions",
    "tools": "use /v1/chat/completions",
    "tool_choice": "use /v1/chat/completions",
    "audio": "this server gives text",
    "prediction": "leave it out",
    "web_search_options": "leave it out",
    "reasoning_effort": "use enable_thinking where the model's template has it",
    "suffix": "this server completes at the end of a prompt, it fills nothing in",
    "grammar": "use response_format",
    "json_schema": "use response_format",
    "guided_json": "use response_format",
    "guided_regex": "use response_format",
    "guided_choice": "use response_format",
    "guided_grammar": "use response_format",
    "structured_outputs": "use response_format",
    "stop_token_ids": "use stop",
    "min_tokens": "use logit_bias against the tokens that end",
    "ignore_eos": "use logit_bias against the tokens that end",
    "use_beam_search": "use n",
    "prompt_logprobs": "use echo with logprobs on /v1/completions",
    "typical_p": "use top_p or min_p",
    "mirostat": "use top_p or min_p",
    "lora": "serve the merged model",
}
_NOTHING = ("none", "auto", "default")


def refusal(param: str | None, message: str) -> PydanticCustomError:
    """A refusal that names its field, for pydantic to carry; a `param` of None is the whole body."""
    return PydanticCustomError("refused", "{text}", {"param": param, "text": message})


def refuse_kind(data: Any, taken: Collection[str], param: str, said: str, instead: str) -> None:
    """Refuse a part of a body whose type is none that is served; what has none is left to its schema.

    Args:
        data: the part.
        taken: types that are served.
        param: field of the request.
        said: what is refused, with a place for the type.
        instead: what to do.

    Raises:
        PydanticCustomError: it is of another type.
    """
    kind = data.get("type") if isinstance(data, Mapping) else None
    if isinstance(kind, str) and kind not in taken:
        raise refusal(param, f"{said.format(kind[:40])} not supported by this server; {instead}")


def refuse_unsupported(data: Mapping[str, Any], taken: Collection[str] = ()) -> None:
    """Refuse what is asked for and not served.

    Args:
        data: a body.
        taken: fields that this kind of request has nevertheless.

    Raises:
        PydanticCustomError: names the first such field and what to use instead.
    """
    for name, instead in _REFUSED.items():
        value = data.get(name)
        if name not in taken and value and value not in _NOTHING:
            raise refusal(name, f"{name} is not supported by this server; {instead}")
    modalities = data.get("modalities")
    if modalities and modalities != ["text"]:
        raise refusal("modalities", "modalities other than text are not supported by this server")


def refuse_surrogates(data: Any) -> None:
    """Refuse halves of surrogate pairs, which are no text and which no tokenizer takes.

    Args:
        data: of JSON.

    Raises:
        PydanticCustomError: names the field at the top that holds one.
    """
    for name, value in data.items() if isinstance(data, dict) else [(None, data)]:
        stack = [name, value]
        while stack:
            found = stack.pop()
            if isinstance(found, str):
                if not _is_text(found):
                    field = name if name is not None and _is_text(name) else None
                    raise refusal(
                        field, "half of a surrogate pair is no text; send whole characters"
                    )
            elif isinstance(found, dict):
                stack += [*found.keys(), *found.values()]
            elif isinstance(found, list):
                stack += found


def depth_of(data: Any) -> int:
    """How deeply lists and objects of JSON are nested; 0 for a plain value."""
    depth, level = 0, [data]
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [c for v in level for c in (v.values() if isinstance(v, dict) else v)]
    return depth


def _is_text(value: str) -> bool:
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
