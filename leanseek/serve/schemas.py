"""What clients send and what they get back: OpenAI's shapes, with DeepSeek's fields and a few of our own.

Strict: an unknown field is refused, for a misspelt one that is passed over is worse than an error. The fields of
`Ignored` are known to clients and change nothing here.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

MOST_CHOICES = 32  # of n, and of the prompts of one call
MOST_TOP = 20  # alternatives shown beside a token
Id = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Sent(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Received(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="forbid")


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Ignored(Sent):
    """Fields that clients send by habit."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None


class StreamOptions(Sent):
    include_usage: bool = False


class Drawing(Ignored):
    """How to draw and when to stop; null is as good as absent."""

    model: str = Field(description="The name that /v1/models gives.")
    max_tokens: StrictInt | None = Field(None, ge=1, description="Tokens of the answer; else the service's limit.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token; 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: StrictInt | None = Field(None, ge=0, lt=2**31, description="0: no limit.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias] | None = Field(None, max_length=1024)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    seed: StrictInt | None = Field(None, ge=-(2**62), lt=2**62, description="The same seed, the same text.")
    n: StrictInt | None = Field(None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class TextPart(Sent):
    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class CalledFunction(Sent):
    name: str
    arguments: str


class SentCall(Sent):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: StrictInt | None = None


class SystemMessage(Sent):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Sent):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Sent):
    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = Field(None, description="Thoughts; read only where the message is a prefix.")
    tool_calls: list[SentCall] | None = Field(None, max_length=128)
    prefix: bool = Field(False, description="The last message only: the answer goes on from here.")
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Sent):
    role: Literal["tool"]
    content: Content
    tool_call_id: str = ""


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Sent):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments.")
    strict: bool | None = None


class Tool(Sent):
    type: Literal["function"]
    function: Function


class FunctionName(Sent):
    name: Name


class NamedTool(Sent):
    type: Literal["function"]
    function: FunctionName


class TextFormat(Sent):
    type: Literal["text"]


class JsonObjectFormat(Sent):
    type: Literal["json_object"]


class JsonSchema(Sent):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Sent):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(Drawing):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1, description="Another name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: StrictInt | None = Field(None, ge=0, le=MOST_TOP)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens are two names of one thing: give one")
        names = [tool.function.name for tool in self.tools or []]
        if len(names) > len(set(names)):
            raise ValueError("tools: two functions have the same name")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice asks for a tool, and there are no tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools")
        asks_for_json = self.response_format is not None and self.response_format.type != "text"
        if asks_for_json and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("response_format and a required tool exclude each other: give one")
        if any(isinstance(message, AssistantMessage) and message.prefix for message in self.messages[:-1]):
            raise ValueError("messages: only the last one can be a prefix")
        return self


class CompletionRequest(Drawing):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[Id], Field(min_length=1)]
        | Annotated[list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1, max_length=MOST_CHOICES)]
    ) = Field(description="Text, token ids, or several of either.")
    suffix: str | None = Field(None, description="What comes after the gap to be filled (fill in the middle).")
    echo: bool | None = Field(None, description="Repeat the prompt before the answer.")
    logprobs: StrictInt | None = Field(None, ge=0, le=MOST_TOP)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: the prompt's own logprobs are not worked out; leave one of the two out")
        if self.suffix is not None and not isinstance(self.prompt, str):
            raise ValueError("suffix: needs a prompt that is one text")
        if self.suffix is not None and self.echo:
            raise ValueError("suffix: a filled gap has no echo")
        return self


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────


class CompletionDetails(Received):
    reasoning_tokens: int


class PromptDetails(Received):
    cached_tokens: int


class Usage(Received):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(Received):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Received):
    content: list[TokenLogprob]


class TextLogprobs(Received):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class FunctionCall(Received):
    name: str
    arguments: str


class ToolCall(Received):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(Received):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(Received):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatResponse(Received):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(Received):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class CompletionResponse(Received):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(Received):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    max_tokens: int


class ModelList(Received):
    object: Literal["list"]
    data: list[ModelCard]


class Health(Received):
    status: Literal["ok", "closing", "failed"]
    model: str
    running: int
    waiting: int
    drafted: int
    accepted: int


class Problem(Received):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Received):
    error: Problem


class Markdown(Sent):
    text: str


class Html(Received):
    html: str
