"""What goes over the wire: the requests and replies of OpenAI's API, as far as a small model can serve it.

https://platform.openai.com/docs/api-reference/chat and /completions. A field that asks for something no
answer could show (`user`, `store`, `metadata`, ...) is ignored, as clients send many; one whose neglect would
make the answer wrong (`tools`, `suffix`, ...) is refused with a sentence of `REFUSED`. Beyond OpenAI's:
`top_k`, `min_p`, `repetition_penalty` and max_tokens = -1 by the names that vLLM gave them, as well as
/tokenize and /detokenize, and for chat the `truncation` of OpenAI's newer Responses API.
"""

import json
import re
import secrets
import time
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from typing_extensions import Required, TypedDict  # of which pydantic wants these before Python 3.12

from decoding.text import word_of

REFUSED = {
    "tools": "this model cannot call tools",
    "functions": "this model cannot call functions",
    "response_format": 'only {"type": "text"} is offered: this model cannot be held to a format',
    "suffix": "this model only writes on at the end: there is no suffix",
    "best_of": "best_of is not offered; ask for n answers and choose",
    "modalities": "this model reads and writes text only",
    "audio": "this model reads and writes text only",
}
MOST_BIASES = 1024


def biases(value):
    """{id: bias} from {"id": bias}; only looked at up to the first that is wrong."""
    if not isinstance(value, dict):
        raise ValueError("Input should be a valid dictionary")
    if len(value) > MOST_BIASES:
        raise ValueError(f"at most {MOST_BIASES:,} tokens may have a bias")
    for token, bias in value.items():
        if not re.fullmatch("[0-9]{1,9}", token):
            raise ValueError("the keys should be ids of tokens")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError("the values should be numbers from -100 to 100")
    return {int(token): float(bias) for token, bias in value.items()}


def listed(item, **limits):
    """A list of which no more is looked at than up to the first item that is wrong."""
    return Annotated[list[item], Field(fail_fast=True, **limits)]


Nothing = listed(Any, max_length=0)
Empty = Annotated[dict[str, Any], Field(max_length=0)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Biases = Annotated[
    Any,
    AfterValidator(biases),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MOST_BIASES,
        }
    ),
]
SEED = 2**63
TO_THE_END = "-1 and null: up to the context's end"


class ApiError(Exception):
    """What a client did wrong, or what we cannot do for it. headers: further ones of the reply."""

    def __init__(self, status, message, code=None, param=None, headers=None):
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def body(self):
        """An error as OpenAI's API tells it."""
        kinds = {401: "authentication_error", 403: "permission_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# ---- requests


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextOnly(Strict):
    type: Literal["text"]


class StreamOptions(Strict):
    include_usage: bool | None = None


class Asked(Strict):
    """What both kinds of request have in common; null is as if a field were left out, but for max_tokens."""

    model: str | None = Field(None, description="the name from /v1/models, or nano, or nothing")
    n: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="answers; the i-th is drawn with seed + i; at most as many as there are slots"
    )
    max_tokens: Literal[-1] | Count | None = Field(None, description=TO_THE_END)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy (1.0)")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="-1 and 0: off")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(None, description="1: off")
    seed: Annotated[int, Field(ge=-SEED, lt=SEED)] | None = Field(None, description="the same answer again")
    frequency_penalty: Penalty | None = Field(None, description="times how often a token was drawn")
    presence_penalty: Penalty | None = Field(None, description="if a token was drawn")
    logit_bias: Biases | None = Field(None, description="added to the logits of tokens, by their ids")
    stop: StopText | listed(StopText, max_length=64) | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self):
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limit(self):
        """Of tokens; None: the end of the context."""
        return None if self.max_tokens == -1 else self.max_tokens

    @property
    def sampling(self):
        """The options of `sampling.logits_to_probs`."""
        names = ("temperature", "top_p", "min_p", "logit_bias")
        names += ("repetition_penalty", "frequency_penalty", "presence_penalty")
        options = {name: getattr(self, name) for name in names} | {"top_k": max(0, self.top_k or 0)}
        return {name: value for name, value in options.items() if value is not None}


# Dictionaries, as there may be many: an object takes five times the time and memory.


class TextPart(TypedDict):
    __pydantic_config__ = Strict.model_config
    type: Literal["text"]
    text: str


class SentMessage(TypedDict, total=False):
    __pydantic_config__ = Strict.model_config
    role: Required[Literal["system", "developer", "user", "assistant"]]
    content: str | listed(TextPart) | None


def plain(message):
    """A message as `render_chat` takes it."""
    role, content = message["role"], message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return {"role": "system" if role == "developer" else role, "content": content}


Message = Annotated[SentMessage, AfterValidator(plain)]


class ChatRequest(Asked):
    messages: listed(Message, min_length=1) = Field(description="the last one may be the answer's beginning")
    max_completion_tokens: Literal[-1] | Count | None = Field(None, description="= max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: the oldest turns go if they do not fit; else that is an error"
    )
    response_format: TextOnly | None = None
    tools: Nothing | None = None
    functions: Nothing | None = None
    modalities: listed(Literal["text"], max_length=1) | None = None
    audio: Empty | None = None
    echo: ClassVar[bool] = False

    @property
    def limit(self):
        return super().limit if self.max_completion_tokens in (None, -1) else self.max_completion_tokens

    @property
    def n_logprobs(self):
        return (self.top_logprobs or 0) if self.logprobs else None


TokenIds = listed(int, min_length=1)
MOST_PROMPTS = dict(min_length=1, max_length=1024)  # and no more than there are slots


class CompletionRequest(Asked):
    prompt: str | TokenIds | listed(str, **MOST_PROMPTS) | listed(TokenIds, **MOST_PROMPTS)
    max_tokens: Annotated[int, Field(ge=-1)] | None = Field(16, description=TO_THE_END)
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = Field(None, description="the text begins with the prompt, and logprobs with its")
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def prompts(self):
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt

    @property
    def n_logprobs(self):
        return self.logprobs


class TokenizeRequest(Strict):
    """A text or a conversation, as vLLM's /tokenize takes them."""

    model: str | None = None
    prompt: str | None = None
    messages: listed(Message, min_length=1) | None = Field(None, description="in place of `prompt`")
    add_special_tokens: bool = Field(True, description="whether <|bos|> comes first")
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: listed(int)


def read(form, content_type, body):
    """The body of a request as a `form`, a class of the above, in time that is linear in its length."""
    kind = content_type.partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/(.+\+)?json", kind):
        raise ApiError(400, "the body must be a JSON object, sent as application/json", "invalid_json")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", None) or str(error) or "it is nested too deeply"
        raise ApiError(400, f"the body is not valid JSON: {why}", "invalid_json") from None
    try:
        return form.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False, include_context=False)
        raise explained(found) from None


def explained(errors):
    """pydantic's findings as one error of the API: about the first field that is wrong."""
    where = [str(part) for part in errors[0]["loc"]]
    field = where[0] if where else None
    if field is None:
        return ApiError(400, "the body must be a JSON object, sent as application/json", "invalid_json")
    if field in REFUSED:
        return ApiError(400, REFUSED[field], "unsupported", field)
    found = [error["msg"].removeprefix("Value error, ") for error in errors if str(error["loc"][0]) == field]
    place = ".".join(part for part in where if part.isidentifier() or part.isdigit())
    return ApiError(400, f"{place}: {'; or: '.join(dict.fromkeys(found))}", "invalid_value", field)


# ---- replies: their description, for /openapi.json

FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChosenLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class CompletionLogprobs(BaseModel):
    """null: of the first token of a prompt, which follows nothing."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Reply(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    warnings: list[str] = Field(description="what the model did not read as it was sent")


class ChatReply(Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    dropped_messages: int = Field(description="so many of the oldest did not fit (truncation: auto)")


class CompletionReply(Reply):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class Model(BaseModel):
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
    data: list[Model]


class TokenizeReply(BaseModel):
    """max_model_len: tokens of the context."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(BaseModel):
    prompt: str


class Health(BaseModel):
    """status: "failed" as long as the last step did; running and waiting: requests."""

    status: Literal["ok", "failed"]
    running: int
    waiting: int
    slots: int
    tokens: int
    failures: int
    error: str | None


# ---- replies: how they are written


class Form:
    """How a reply is written down. logprobs are told for every token that `usage` counts."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


class ChatForm(Form):
    prefix, name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    first = {"delta": {"role": "assistant", "content": ""}}
    last = {"delta": {}}

    def whole(self, text):
        return {"message": {"role": "assistant", "content": text}}

    def piece(self, text):
        return {"delta": {"content": text}}

    def logprobs(self, choice, tokens, logprobs):
        told = [
            self.told(token, logprob) | {"top_logprobs": [self.told(*pair) for pair in likeliest]}
            for token, (logprob, likeliest) in zip(tokens, logprobs, strict=True)
        ]
        return {"content": told}

    def told(self, token, logprob):
        data = word_of(self.tokenizer, token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}


class TextForm(Form):
    prefix, name, chunk_name = "cmpl-", "text_completion", "text_completion"
    first, last = None, {"text": ""}

    def whole(self, text):
        return {"text": text}

    piece = whole

    def logprobs(self, choice, tokens, logprobs):
        told = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, found in zip(tokens, logprobs, strict=True):
            told["tokens"].append(self.name_of(token))
            told["text_offset"].append(choice.n_characters)
            if found is None:  # a prompt's first token
                told["token_logprobs"].append(None)
                told["top_logprobs"].append(None)
            else:
                pairs = [(token, found[0]), *found[1]]
                told["token_logprobs"].append(max(found[0], -9999.0))
                told["top_logprobs"].append({self.name_of(one): max(value, -9999.0) for one, value in pairs})
            if found or token != self.tokenizer.bos_id:
                # Each character has one byte that is none of UTF-8's continuation bytes.
                choice.n_characters += sum(byte & 0xC0 != 0x80 for byte in word_of(self.tokenizer, token))
        return told

    def name_of(self, token):
        return name_of(self.tokenizer, token)


def name_of(tokenizer, token):
    """A token as text; one that is a part of a character as its bytes."""
    data = word_of(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Reply:
    """The reply to one request, whole or as a stream of events. prompt: see `serving.Prompt`."""

    def __init__(self, service, form, asked, prompt, deadline):
        self.form, self.asked, self.prompt = form, asked, prompt
        self.requests = service.requests(prompt, asked)
        self.n_prompt, self.n_tokens = sum(map(len, prompt.ids)), 0
        self.answers = service.follow(self.requests, prompt.stops, deadline)
        self.head = {
            "id": form.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.name,  # what has to be the same for the same seed's answer
        }

    @property
    def usage(self):
        total = self.n_prompt + self.n_tokens
        return {"prompt_tokens": self.n_prompt, "completion_tokens": self.n_tokens, "total_tokens": total}

    def logprobs(self, choice, tokens, logprobs):
        if self.asked.n_logprobs is None:
            return None
        return self.form.logprobs(choice, tokens, logprobs)

    async def news(self):
        """What `Service.follow` yields, where an answer begins with the prompt if that is asked for (`echo`).

        Then the logprobs of a text that has ended by itself have one for its end, too: lm-evaluation-harness
        scores a text by asking for one token more, and counts on that one.
        """
        async for choice, text, tokens, logprobs in self.answers:
            self.n_tokens += len(tokens)
            if self.asked.echo and not choice.has_begun:
                place = choice.index // (self.asked.n or 1)
                text = self.prompt.texts[place] + text
                if self.asked.n_logprobs is not None:
                    tokens = self.prompt.ids[place] + tokens
                    logprobs = [None, *self.requests[choice.index].prompt_logprobs, *logprobs]
            ending = self.requests[choice.index].ending
            if self.asked.echo and choice.has_ended_itself and ending:
                tokens, logprobs = [*tokens, ending[0]], [*logprobs, ending[1]]
            yield choice, text, tokens, logprobs
            choice.has_begun = True

    async def whole(self):
        texts, told, finished = {}, {}, {}
        async for choice, text, tokens, logprobs in self.news():
            texts.setdefault(choice.index, []).append(text)
            if (more := self.logprobs(choice, tokens, logprobs)) is not None:
                before = told.setdefault(choice.index, {name: [] for name in more})
                for name, values in more.items():
                    before[name] += values
            finished[choice.index] = choice
        choices = [
            {
                "index": index,
                **self.form.whole("".join(texts[index])),
                "logprobs": told.get(index),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in sorted(finished.items())
        ]
        about = {"warnings": self.prompt.warnings, **self.prompt.extra}
        return {**self.head, "object": self.form.name, "choices": choices, "usage": self.usage, **about}

    async def events(self):
        """Server-sent events. The first one is there before the reply begins: errors still have a status."""
        chunks = self.chunks()
        first = await anext(chunks)

        async def events():
            try:
                yield event(first)
                async for chunk in chunks:
                    yield event(chunk)
            except ApiError as error:
                yield event(error.body)
            yield "data: [DONE]\n\n"

        return events()

    async def chunks(self):
        with_usage = self.asked.stream_options and self.asked.stream_options.include_usage
        head = {**self.head, "object": self.form.chunk_name, **self.prompt.extra}
        if with_usage:
            head["usage"] = None
        once = {"warnings": self.prompt.warnings}
        waiting = {}  # tokens whose text is not certain yet, by choice, for their logprobs

        def chunk(choice, content, finish_reason=None):
            logprobs = None
            if (drawn := waiting.pop(choice, None)) and drawn[0]:
                logprobs = self.logprobs(choice, *drawn)
            part = {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
            data = {**head, **once, "choices": [part]}
            once.clear()
            return data

        async for choice, text, tokens, logprobs in self.news():
            if self.form.first and not choice.has_begun:
                yield chunk(choice, self.form.first)
            ids, values = waiting.setdefault(choice, ([], []))
            ids.extend(tokens)
            values.extend(logprobs)
            if text:
                yield chunk(choice, self.form.piece(text))
            if choice.finish_reason:
                yield chunk(choice, self.form.last, choice.finish_reason)
        if with_usage:
            yield {**head, "choices": [], "usage": self.usage}


def event(data):
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
