"""What a request says about tools: which there are, and which may, must or must not be called."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, model_validator

from acttail.serve.bodies import Model
from acttail.serve.messages import DEEPEST
from acttail.serve.unsupported import depth_of, refusal, refuse_kind

# OpenAI's own limit of their number.
_MOST = 128
# Characters of JSON of all of them: some 40,000 tokens, more than most contexts hold.
_LONGEST = 1 << 17
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# What says of an object's further properties; without any of it, those that are named are all.
_OPEN = frozenset(
    ("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "minProperties", "allOf",
     "anyOf", "oneOf", "$ref", "if", "dependentSchemas")
)  # fmt: skip


class Function(Model):
    """A function that a model may call.

    Attributes:
        strict: whether the arguments are held to the schema; they always are.
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_shown(self) -> dict[str, Any]:
        """Its parameters as the model is told of them."""
        return {"type": "object", "properties": {}} if self.parameters is None else self.parameters

    @property
    def schema_held(self) -> dict[str, Any]:
        """What its arguments are held to: an object, of no properties but those that are named where some are.

        OpenAI's models seldom make up further ones; small ones do, and a function would fail on them.
        """
        schema = {"type": "object"} | self.schema_shown
        named, wanted = schema.get("properties"), schema.get("required", [])
        whole = (
            isinstance(named, dict) and isinstance(wanted, list) and all(w in named for w in wanted)
        )
        if whole and not _OPEN & set(schema):
            schema["additionalProperties"] = False
        return schema


class Tool(Model):
    """A tool of a request."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it."""
        function = self.function
        told: dict[str, Any] = {"name": function.name}
        if function.description:
            told["description"] = function.description
        return {"type": "function", "function": told | {"parameters": function.schema_shown}}


def _checked(tools: list[Tool]) -> list[Tool]:
    if len(tools) > _MOST:
        raise refusal("tools", f"tools are {len(tools)}; send at most {_MOST}")
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        function, where = tool.function, f"tools[{i}].function"
        if not _NAME.fullmatch(function.name):
            raise refusal(
                "tools", f"{where}.name {function.name[:80]!r}: a name is 1 to 64 letters, digits, _ and -"
            )  # fmt: skip
        if function.name in seen:
            raise refusal("tools", f"{where}.name {function.name!r} is there twice; rename one")
        seen.add(function.name)
        schema = function.parameters or {}
        if schema.get("type", "object") != "object":
            raise refusal(
                "tools", f"{where}.parameters ({function.name}) is to be a schema of type object"
            )
        if depth_of(schema) > DEEPEST:
            raise refusal("tools", f"{where}.parameters ({function.name}) is nested too deeply")
    size = len(json.dumps([t.plain() for t in tools], ensure_ascii=False))
    if size > _LONGEST:
        raise refusal(
            "tools", f"tools are {size} characters of JSON; send at most {_LONGEST}, or fewer tools"
        )
    return tools


Tools = Annotated[list[Tool], AfterValidator(_checked)]


class _Name(Model):
    name: str


class NamedChoice(Model):
    """The one function that is to be called."""

    type: Literal["function"]
    function: _Name

    @model_validator(mode="before")
    @classmethod
    def _only_functions(cls, data: Any) -> Any:
        instead = "use none, auto, required or a function"
        refuse_kind(data, ("function",), "tool_choice", "tool_choice of type {} is", instead)
        return data


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


@dataclass(frozen=True)
class ToolUse:
    """What a request's answer may do with tools.

    Attributes:
        shown: tools as a chat template takes them.
        functions: those that may be called, by their place among the tools.
        forced: whether one must be.
        named: whether the request names the one.
        many: whether several calls may be made.
    """

    shown: list[dict[str, Any]]
    functions: Mapping[int, Function]
    forced: bool
    named: bool
    many: bool


def tool_use(tools: list[Tool], choice: ToolChoice, *, parallel: bool) -> ToolUse | None:
    """What an answer may do with tools; None where it cannot call any, and is not shown them either.

    Args:
        tools: of the request.
        choice: of them.
        parallel: whether several may be called.

    Raises:
        PydanticCustomError: the choice is none of the tools.
    """
    named = isinstance(choice, NamedChoice)
    if not tools and (named or choice == "required"):
        raise refusal("tool_choice", "tool_choice needs tools; send them, or leave it out")
    if not tools or choice == "none":
        return None
    functions = {i: tool.function for i, tool in enumerate(tools)}
    if isinstance(choice, NamedChoice):
        wanted = choice.function.name
        functions = {i: f for i, f in functions.items() if f.name == wanted}
        if not functions:
            raise refusal(
                "tool_choice", f"tool_choice names {wanted[:80]!r}, which is not among the tools; send it with them"
            )  # fmt: skip
    return ToolUse(
        shown=[tool.plain() for tool in tools], functions=functions, forced=named or choice == "required",
        named=named, many=parallel and not named,
    )  # fmt: skip
