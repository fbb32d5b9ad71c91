"""What a request may hold: OpenAI's fields, checked, and a few of our own."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from acttail.engine.sampling import Sampling
from acttail.serve.bodies import Body, Model
from acttail.serve.messages import Message, check_calls
from acttail.serve.tools import ToolChoice, Tools, ToolUse, tool_use
from acttail.serve.unsupported import refusal

# Ids are kept in 32 bits by every tokenizer; whether the model has one is checked against its vocabulary.
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
# Arguments of a chat template that are not the client's to set.
_RESERVED = frozenset(
    ("messages", "conversation", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt",
     "continue_final_message", "return_dict", "return_tensors", "padding", "truncation", "max_length",
     "tokenizer_kwargs", "return_assistant_tokens_mask")
)  # fmt: skip


class _StreamOptions(Model):
    include_usage: bool | None = None


class _JsonSchema(Model):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class _Format(Model):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: _JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "_Format":
        if self.type == "json_schema" and self.json_schema is None:
            raise refusal(
                "response_format", "response_format of type json_schema needs json_schema.schema"
            )
        return self


class _Request(Body):
    """Fields common to both kinds of completion."""

    model: str
    max_tokens: int | None = Field(None, ge=-1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[TokenId, Bias] | None = None
    user: str | None = None
    response_format: _Format | None = None
    # Ours: sampling that OpenAI's API lacks, and the sparsity of this request.
    top_k: int = Field(0, ge=0, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    sparsity: float | None = Field(None, ge=0, le=0.99)

    @model_validator(mode="after")
    def _check_stop(self) -> "_Request":
        if len(self.stops) > 16 or any(len(s) > 1000 for s in self.stops):
            raise refusal("stop", "stop takes up to 16 strings of up to 1,000 characters")
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "stream_options is only allowed with stream")
        return self

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [s for s in given if s]

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The JSON schema that the answer is held to, None for free text."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return form.json_schema.schema_ if form.json_schema is not None else {"type": "object"}

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, index: int) -> Sampling:
        """How choice number `index` is drawn; choices of one seed differ from each other.

        A seed of -1 is none, as llama-server's clients send it. What a seed gives does not depend on who else is
        served, and so not on whether there are drafts.
        """
        seed = None if self.seed in (None, -1) else (self.seed + index) % 2**63
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, bias=tuple((self.logit_bias or {}).items()), seed=seed,
            repeatable=True,
        )  # fmt: skip


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise refusal("best_of", "best_of other than n is not supported by this server")
        if not self.prompt or not all(self.prompts):
            raise refusal("prompt", "prompt is empty")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def scored(self) -> bool:
        """Whether the tokens of the prompt come back with their log-probabilities."""
        return self.echo and self.logprobs is not None


class Conversation(Body):
    """What a chat template reads."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None

    @model_validator(mode="after")
    def _check_template(self) -> "Conversation":
        for name in self.chat_template_kwargs or {}:
            if name in _RESERVED:
                raise refusal(
                    "chat_template_kwargs",
                    f"{name} is not an argument to set; it has a field of its own",
                )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise refusal(
                "continue_final_message",
                "continue_final_message needs an assistant's message at the end",
            )
        if self.continue_final_message and self.messages[-1].tool_calls:
            raise refusal(
                "continue_final_message",
                "continue_final_message goes on with a text, and the last message has tool_calls",
            )
        check_calls(self.messages)
        return self

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Variables of the template that the request sets."""
        given = dict(self.chat_template_kwargs or {})
        if self.enable_thinking is not None:
            given["enable_thinking"] = self.enable_thinking
        return given


class ChatRequest(_Request, Conversation):
    """POST /v1/chat/completions."""

    takes: ClassVar[frozenset[str]] = frozenset(("tools", "tool_choice"))

    max_completion_tokens: int | None = Field(None, ge=-1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    _use: ToolUse | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        self._use = tool_use(self.tools, self.tool_choice, parallel=self.parallel_tool_calls)
        if self.top_logprobs is not None and not self.logprobs:
            raise refusal("top_logprobs", "top_logprobs needs logprobs")
        return self

    @property
    def limit(self) -> int | None:
        """New tokens asked for; -1 for as many as there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def tool_use(self) -> ToolUse | None:
        """What the answer may do with tools; None for nothing."""
        return self._use


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a conversation as the chat template makes it."""

    takes: ClassVar[frozenset[str]] = frozenset(("tools",))

    content: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=10_000)
    tools: Tools = Field(default_factory=list)
    add_special: bool = False
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        given = [v for v in (self.content, self.prompt, self.messages) if v is not None]
        if len(given) != 1:
            raise refusal("content", "give one of content, prompt and messages")
        check_calls(self.messages or [])
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: list[TokenId]
