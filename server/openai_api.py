"""OpenAI's API as data: the fields of requests and responses, and the form of an error.

The reference is https://platform.openai.com/docs/api-reference/chat and /completions. Fields that cannot
change an answer (`user`, `store`, `metadata`, ...) are ignored, because clients send many of them. Fields
that would need another answer (`tools`, `suffix`, ...) are refused with a sentence from `UNSUPPORTED`.
Extensions carry the names other servers gave them: `top_k`, `min_p`, `repetition_penalty`, max_tokens = -1,
/tokenize and /detokenize are vLLM's; `truncation` is from OpenAI's Responses API.

This module depends on pydantic only. Inside server/, each module imports only from those before it:
openai_api, scheduler, metrics, service, responses, middleware, connections, app.
"""

# Not taken from `openai.types`: those take 1 s and 14 MB to import (measured) and check no ranges on input.

import json
import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    with_config,
)
from pydantic_core import ErrorDetails
from typing_extensions import Required, TypedDict  # pydantic needs these before Python 3.12

UNSUPPORTED = {
    "tools": "this model cannot call tools",
    "functions": "this model cannot call functions",
    "response_format": 'only {"type": "text"} is supported: this model cannot be held to a format',
    "suffix": "suffix is not supported: this model only continues a text at its end",
    "best_of": "best_of is not supported; ask for n answers and choose one",
    "modalities": "this model reads and writes text only",
    "audio": "this model reads and writes text only",
}
MAX_LOGIT_BIASES = 1024
SEED_LIMIT = 2**63


class ApiError(Exception):
    """An error that the client is told, in OpenAI's form.

    status: the HTTP status. code: a word for programs. param: the field at fault.
    headers: added to the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body of the response."""
        types = {401: "authentication_error", 403: "permission_error"}
        kind = "server_error" if self.status >= 500 else types.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# ---- requests --------------------------------------------------------------------------------------


def check_logit_bias(value: object) -> dict[int, float]:
    """Convert {"id": bias} to {id: bias}. Stops at the first mistake, so that a huge body costs little."""
    if not isinstance(value, dict):
        raise ValueError("Input should be a valid dictionary")
    if len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"at most {MAX_LOGIT_BIASES:,} tokens may have a bias")
    for token, bias in value.items():
        if not re.fullmatch("[0-9]{1,9}", token):
            raise ValueError("the keys should be ids of tokens")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError("the values should be numbers from -100 to 100")
    return {int(token): float(bias) for token, bias in value.items()}


T = TypeVar("T")
FailFastList = Annotated[list[T], Field(fail_fast=True)]  # validation stops at the first wrong item
EmptyList = Annotated[FailFastList[Any], Field(max_length=0)]
EmptyDict = Annotated[dict[str, Any], Field(max_length=0)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
PositiveInt = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
LogitBias = Annotated[
    Any,
    AfterValidator(check_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIASES,
        }
    ),
]
STRICT = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
TO_THE_END = "-1 and null: up to the end of the context"


class StrictModel(BaseModel):
    model_config = STRICT


class TextFormat(StrictModel):
    type: Literal["text"]


class StreamOptions(StrictModel):
    include_usage: bool | None = None


class GenerationRequest(StrictModel):
    """The fields that both kinds of completion share. null means the default, except in max_tokens."""

    model: str | None = Field(None, description="the name from /v1/models, or nano, or left out")
    n: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="number of answers, at most the number of slots; the i-th is sampled with seed + i",
    )
    max_tokens: Literal[-1] | PositiveInt | None = Field(None, description=TO_THE_END)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 is greedy (default: 1.0)"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="-1 and 0: off")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(None, description="1: off")
    seed: Annotated[int, Field(ge=-SEED_LIMIT, lt=SEED_LIMIT)] | None = Field(
        None, description="the same seed gives the same answer"
    )
    frequency_penalty: Penalty | None = Field(
        None, description="subtracted from a token's logit for each time it was sampled"
    )
    presence_penalty: Penalty | None = Field(
        None, description="subtracted from a token's logit once it was sampled"
    )
    logit_bias: LogitBias | None = Field(None, description="added to the logits of tokens, by their ids")
    stop: StopText | Annotated[FailFastList[StopText], Field(max_length=64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def max_new_tokens(self) -> int | None:
        """None: up to the end of the context."""
        return None if self.max_tokens == -1 else self.max_tokens

    @property
    def sampling_options(self) -> dict[str, Any]:
        """Keyword arguments for `logits_to_probs`."""
        names = ["temperature", "top_p", "min_p", "logit_bias"]
        names += ["repetition_penalty", "frequency_penalty", "presence_penalty"]
        options = {name: getattr(self, name) for name in names} | {"top_k": max(0, self.top_k or 0)}
        return {name: value for name, value in options.items() if value is not None}


# Messages are dictionaries because there may be very many: objects take five times the time and memory.


@with_config(STRICT)
class TextPart(TypedDict):
    type: Literal["text"]
    text: str


@with_config(STRICT)
class RequestMessage(TypedDict, total=False):
    role: Required[Literal["system", "developer", "user", "assistant"]]
    content: str | FailFastList[TextPart] | None


def flatten_message(message: RequestMessage) -> dict[str, str]:
    """Convert a message to the form that `render_chat` takes: one of three roles, and content as a string."""
    role, content = message["role"], message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return {"role": "system" if role == "developer" else role, "content": content}


FlattenedMessage = Annotated[RequestMessage, AfterValidator(flatten_message)]
Messages = Annotated[FailFastList[FlattenedMessage], Field(min_length=1)]


class ChatCompletionRequest(GenerationRequest):
    messages: Messages = Field(description="the last message may be the beginning of the answer")
    max_completion_tokens: Literal[-1] | PositiveInt | None = Field(None, description="same as max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: drop the oldest turns if the conversation is too long; else that is an error"
    )
    response_format: TextFormat | None = None
    tools: EmptyList | None = None
    functions: EmptyList | None = None
    modalities: Annotated[FailFastList[Literal["text"]], Field(max_length=1)] | None = None
    audio: EmptyDict | None = None
    echo: ClassVar[bool] = False

    @property
    def max_new_tokens(self) -> int | None:
        limit = self.max_completion_tokens
        return super().max_new_tokens if limit in (None, -1) else limit

    @property
    def n_logprobs(self) -> int | None:
        """How many of the most likely tokens are reported with each token; None: no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


TokenIds = Annotated[FailFastList[int], Field(min_length=1)]
UP_TO_1024 = Field(min_length=1, max_length=1024)


class CompletionRequest(GenerationRequest):
    prompt: (
        str
        | TokenIds
        | Annotated[FailFastList[str], UP_TO_1024]
        | Annotated[FailFastList[TokenIds], UP_TO_1024]
    ) = Field(description="at most as many prompts as there are slots")
    max_tokens: Annotated[int, Field(ge=-1)] | None = Field(16, description=TO_THE_END)
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = Field(
        None, description="begin the text with the prompt, and logprobs with the prompt's"
    )
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_single else self.prompt  # type: ignore  # mypy does not follow is_single

    @property
    def n_logprobs(self) -> int | None:
        """How many of the most likely tokens are reported with each token; None: no logprobs at all."""
        return self.logprobs


CompletionParams = ChatCompletionRequest | CompletionRequest


class TokenizeRequest(StrictModel):
    """A text or a conversation, as vLLM's /tokenize takes them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = Field(None, description="instead of `prompt`")
    add_special_tokens: bool = Field(True, description="whether <|bos|> comes first")
    return_token_strs: bool | None = None


class DetokenizeRequest(StrictModel):
    model: str | None = None
    tokens: FailFastList[int]


RequestT = TypeVar("RequestT", bound=StrictModel)


def parse_request(schema: type[RequestT], content_type: str, body: bytes) -> RequestT:
    """Parse and check a request's body, in time linear in its length. Raises ApiError."""
    media_type = content_type.partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/(.+\+)?json", media_type):
        raise ApiError(400, "the body must be a JSON object, sent as application/json", "invalid_json")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error) or "it is nested too deeply"
        raise ApiError(400, f"the body is not valid JSON: {reason}", "invalid_json") from None
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_input=False, include_url=False, include_context=False)
        raise to_api_error(errors) from None


def to_api_error(errors: list[ErrorDetails]) -> ApiError:
    """Turn pydantic's errors into one ApiError, about the first field that is wrong."""
    location = [str(part) for part in errors[0]["loc"]]
    if not location:
        return ApiError(400, "the body must be a JSON object, sent as application/json", "invalid_json")
    field = location[0]
    if field in UNSUPPORTED:
        return ApiError(400, UNSUPPORTED[field], "unsupported", field)
    messages = [
        error["msg"].removeprefix("Value error, ") for error in errors if str(error["loc"][0]) == field
    ]
    path = ".".join(part for part in location if part.isidentifier() or part.isdigit())
    return ApiError(400, f"{path}: {'; or: '.join(dict.fromkeys(messages))}", "invalid_value", field)


# ---- responses: only described here, for /openapi.json; responses.py builds them ---------------------

FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class CompletionLogprobs(BaseModel):
    """The first token of an echoed prompt follows nothing: its entries are null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class GenerationResponse(BaseModel):
    """The fields that both kinds of completion share."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    warnings: list[str] = Field(description="where the model did not read the prompt exactly as it was sent")
    usage: Usage


class ChatCompletionResponse(GenerationResponse):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    dropped_messages: int = Field(
        description="number of the oldest messages that were dropped (truncation: auto)"
    )


class CompletionResponse(GenerationResponse):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ModelCard(BaseModel):
    """OpenAI's four fields, and what the chat page shows."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: str
    step: int
    validation_loss: float | None
    architecture: str
    parameters: int
    context: int
    vocabulary: int
    device: str
    slots: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    """max_model_len: tokens of context."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    prompt: str


class Health(BaseModel):
    """status: "failed" until a step succeeds again. running, waiting: numbers of requests."""

    status: Literal["ok", "failed"]
    running: int
    waiting: int
    slots: int
    tokens: int
    failures: int
    error: str | None
