"""serve.py as a whole: with OpenAI's client, a browser, a fuzzer, and clients that misbehave.

Two models are served by a real uvicorn in a thread. One is made by hand (`chain` in test_inference.py): in a
chat it answers 你好吗, and it continues texts with 1+1+1+… until the context is full. The other has random
weights and a tokenizer of bytes, so that few tokens are whole characters; it says what `generate` samples.
"""

import argparse
import contextlib
import errno
import functools
import gc
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import prometheus_client.parser
import pytest
import requests
import torch
import warm
from test_inference import chain, checkpoint

import engine.checkpoint
import serve
import server.connections as connections
import server.middleware as middleware
import server.openai_api as openai_api
from config.schema import ModelConfig
from decoding.engine import BatchedDecoder, Request
from decoding.packed import quantize as to_int8
from decoding.sampling import generate
from decoding.text import TextStream
from decoding.text_generator import TextGenerator
from model import GPT
from server.app import make_app
from tokenizer import CHAT_TEMPLATE, N_SPECIAL, BPETokenizer, CharTokenizer, render_chat

openai = pytest.importorskip("openai")

TEXT = "你好吗？Hello? 1+2=3\n"
HI = [{"role": "user", "content": "Hello?"}]


def handmade(stage="sft", block_size=600):
    tokenizer = CharTokenizer.train([TEXT])
    ni, hao, ma, one, plus = tokenizer.encode("你好吗1+").tolist()
    after = {tokenizer.response_id: ni, ni: hao, hao: ma, tokenizer.bos_id: one, one: plus, plus: one}
    template = CHAT_TEMPLATE if stage == "sft" else None
    config, model = chain(tokenizer, after, block_size)
    return checkpoint(tokenizer, config, model, stage=stage, chat_template=template)


def at_random():
    tokenizer = BPETokenizer.train([TEXT], vocab_size=N_SPECIAL + 256)
    torch.manual_seed(0)
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=96).resolved(tokenizer.vocab_size)
    model = GPT(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return checkpoint(tokenizer, config, model)


class Served:
    """A running server, with its service and an OpenAI client."""

    def __init__(self, listener, service, connections, api_key):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.url, self.listener, self.service, self.connections = url, listener, service, connections
        self.model, self.tokenizer = service.text_generator.model, service.tokenizer
        self.address = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0)
        self.name = service.name

    def chat(self, messages=HI, **options):
        return self.client.chat.completions.create(model="nano", messages=messages, **options)

    def complete(self, prompt="1", **options):
        return self.client.completions.create(model="nano", prompt=prompt, **options)

    def post(self, path="/v1/completions", **options):
        return requests.post(self.url + path, timeout=20, **options)

    def health(self):
        return requests.get(self.url + "/health", timeout=20).json()

    def becomes(self, **state):
        """Wait until /health reports this state."""
        for _ in range(200):
            if (health := self.health()).items() >= state.items():
                return
            time.sleep(0.02)
        pytest.fail(f"{health} does not become {state}")

    def raw(self, data, seconds=10):
        """Send these bytes, and return all that comes back until the server closes the connection."""
        with socket.create_connection(self.address, seconds) as connection:
            connection.sendall(data)
            with contextlib.suppress(ConnectionResetError):
                return b"".join(iter(lambda: connection.recv(65536), b""))
            return b""


@contextlib.contextmanager
def served(folder, checkpoint, slots=4, max_queue=8, timeout=60, api_key=None, cors=()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.checkpoint, "FOLDER", folder)
        path = checkpoint.save()
    args = dict(model=str(path), device="cpu", quantize=None)
    args = argparse.Namespace(**args, slots=slots, max_queue=max_queue, timeout=timeout)
    service, _ = serve.load_service(args)
    listener = connections.bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # little to fill with what nobody reads
    # 5 s for the answers that are still in progress when the server ends.
    server = connections.make_server(make_app(service, api_key, cors), listener, slots + max_queue, 5)
    thread = threading.Thread(target=server.run, args=([listener],))
    service.engine.start()
    thread.start()
    try:
        yield Served(listener, service, server.server_state.connections, api_key)
    finally:
        server.should_exit = True
        thread.join()
        service.engine.stop()
        assert not service.engine.is_alive()


@pytest.fixture(scope="module")
def simple(tmp_path_factory):
    torch.set_num_threads(1)
    with served(tmp_path_factory.mktemp("simple"), handmade()) as server:
        yield server
        server.becomes(running=0, waiting=0)


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    torch.set_num_threads(1)
    with served(tmp_path_factory.mktemp("random"), at_random()) as server:
        yield server
        server.becomes(running=0, waiting=0)


def expected(server, ids, max_tokens, **options):
    """Returns (text, number of tokens), from the reference: `generate`."""
    stream, stops = TextStream(server.tokenizer), server.service.text_generator.stop_tokens
    tokens = list(generate(server.model, ids, max_tokens, stop_tokens=stops, **options))
    return "".join(map(stream.feed, tokens)) + stream.end(), len(tokens)


# ---- answers


def test_the_model_and_the_page(simple):
    (model,) = simple.client.models.list().data
    assert model.id == simple.name and model.task == "sft" and model.context == 600
    assert simple.client.models.retrieve(model.id) == model
    page = requests.get(simple.url, timeout=20)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    assert "innerHTML" not in page.text and not re.findall(r'(?:src|href)="(?!#|data:)', page.text)
    assert simple.health()["status"] == "ok"


def test_a_chat(simple):
    answer = simple.chat(temperature=0)
    assert answer.object == "chat.completion" and answer.model == simple.name
    (choice,) = answer.choices
    assert choice.message.content == "你好吗" and choice.message.role == "assistant"
    assert choice.finish_reason == "stop" and choice.logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len("Hello?") + 2, 3)


def test_a_conversation_in_parts_with_a_system_message(simple):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]
    said = [{"role": "developer", "content": "1+1"}, {"role": "user", "content": parts}]
    said += [{"role": "assistant", "content": None}, HI[0]]
    plain = [{"role": "system", "content": "1+1"}, HI[0], {"role": "assistant", "content": ""}, HI[0]]
    ids, _ = render_chat(simple.tokenizer, plain, add_generation_prompt=True)
    answer = simple.chat(said, temperature=0)
    assert answer.choices[0].message.content == "你好吗" and answer.usage.prompt_tokens == len(ids)


def test_a_stream(simple):
    chunks = list(simple.chat(temperature=0, stream=True, stream_options={"include_usage": True}))
    assert [chunk.object for chunk in chunks] == ["chat.completion.chunk"] * len(chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    *pieces, usage = chunks
    assert usage.choices == [] and usage.usage.completion_tokens == 3
    assert all(piece.usage is None for piece in pieces)
    deltas = [piece.choices[0].delta for piece in pieces]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * 4
    assert [delta.content for delta in deltas] == ["", "你", "好", "吗", None]
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * 4 + ["stop"]


def test_events_are_as_the_standard_has_them(simple):
    ask = {"prompt": "1", "max_tokens": 2, "stream": True, "temperature": 0}
    reply = simple.post(json=ask)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, done, end = reply.content.decode().split("\n\n")
    assert done == "data: [DONE]" and end == ""
    texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
    assert "".join(texts) == "+1"


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 2, "temperature": 0.8, "top_p": 0.9},
        {"seed": -3, "extra_body": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3}},
        {"seed": 4, "extra_body": {"top_k": -1}},
    ],
)
def test_the_text_is_what_generate_draws(random, options):
    """As a whole and as a stream, alone and as one of n: the i-th answer is sampled with seed + i."""
    sampling = {k: v for k, v in options.items() if k not in ("extra_body", "seed")}
    sampling |= {k: max(v, 0) for k, v in options.get("extra_body", {}).items()}
    ids, _ = render_chat(random.tokenizer, HI, add_generation_prompt=True)
    seeds = [options["seed"] + i if "seed" in options else None for i in range(3)]
    texts = [expected(random, ids.tolist(), 25, seed=seed, **sampling) for seed in seeds]
    answer = random.chat(n=3, max_completion_tokens=25, **options)
    assert [choice.message.content for choice in answer.choices] == [text for text, _ in texts]
    assert answer.usage.completion_tokens == sum(n for _, n in texts)
    streamed = ["", "", ""]
    for chunk in random.chat(n=3, max_tokens=25, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [text for text, _ in texts]


def test_completions_of_texts_and_ids(random):
    texts = ["Hello", "你好", ""]
    prompts = [[random.tokenizer.bos_id, *random.tokenizer.encode(text).tolist()] for text in texts]
    results = [expected(random, ids, 7, seed=5) for ids in prompts]
    for given in (texts, prompts):
        answer = random.complete(given, max_tokens=7, seed=5)
        assert [choice.text for choice in answer.choices] == [text for text, _ in results]
        assert answer.usage.prompt_tokens == sum(map(len, prompts))
    for text, ids, result in zip(texts, prompts, results, strict=True):
        for given in (text, ids):
            assert random.complete(given, max_tokens=7, seed=5).choices[0].text == result[0]
    assert random.complete("1", temperature=0).usage.completion_tokens <= 16  # OpenAI's default


PENALTIES = [
    {"frequency_penalty": 0.5},
    {"presence_penalty": 1.5, "temperature": 0.8},
    {"logit_bias": {"9": 100}},
    {"frequency_penalty": -0.2, "presence_penalty": 0.3, "logit_bias": {"9": -100, "12": 3.5}},
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("temperature", [0, 1])
def test_penalties_and_biases(random, penalty, temperature):
    """The text is what `generate` samples; tests/test_model.py compares that with the definitions."""
    options = {"temperature": temperature, **penalty, "seed": 5}
    bias = {int(token): value for token, value in penalty.get("logit_bias", {}).items()}
    ids = [random.tokenizer.bos_id, *random.tokenizer.encode("1+").tolist()]
    text, _ = expected(random, ids, 30, **options | {"logit_bias": bias})
    assert random.complete("1+", max_tokens=30, **options).choices[0].text == text
    ids, _ = render_chat(random.tokenizer, HI, add_generation_prompt=True)
    text, _ = expected(random, ids.tolist(), 30, **options | {"logit_bias": bias})
    assert random.chat(max_tokens=30, **options).choices[0].message.content == text


@pytest.mark.parametrize("max_tokens", [-1, None])
def test_up_to_the_end_of_the_context(random, max_tokens):
    for path, asked, field in (
        ("/v1/completions", {"prompt": "1"}, "max_tokens"),
        ("/v1/chat/completions", {"messages": HI}, "max_tokens"),
        ("/v1/chat/completions", {"messages": HI}, "max_completion_tokens"),
    ):
        reply = random.post(path, json={**asked, field: max_tokens, "temperature": 0})
        assert reply.json()["choices"][0]["finish_reason"] == "length", reply.json()
        assert reply.json()["usage"]["total_tokens"] == 96


def test_an_answer_that_has_begun_is_continued(simple):
    answer = simple.chat([*HI, {"role": "assistant", "content": "1+你"}], temperature=0)
    assert answer.choices[0].message.content == "好吗"
    assert answer.usage.prompt_tokens == len("Hello?") + 2 + 3
    greeting = {"role": "assistant", "content": "Hello?"}
    assert simple.chat([greeting, *HI], temperature=0).choices[0].message.content == "你好吗"
    answer = simple.chat([{"role": "assistant", "content": "你"}], temperature=0)
    assert answer.choices[0].message.content == "好吗"


def test_warnings_about_the_prompt(simple):
    assert simple.chat(temperature=0).warnings == []
    said = [{"role": "user", "content": text} for text in ("1", "2", "3")]
    answer = simple.chat(said, temperature=0)
    assert answer.warnings == ["2 messages were joined to the one before, from the same role"]
    assert answer.usage.prompt_tokens == len("1\n2\n3") + 2
    chunks = list(simple.chat([*HI, {"role": "user", "content": "狐狸"}], temperature=0, stream=True))
    assert chunks[0].warnings == [
        "1 message was joined to the one before, from the same role",
        "2 characters are unknown to this model",
    ]
    assert all("warnings" not in chunk.model_extra for chunk in chunks[1:])
    assert simple.complete("1狐", temperature=0).warnings == ["1 character is unknown to this model"]
    assert simple.complete(["狐", "1", "狐狐"]).warnings == ["3 characters are unknown to this model"]
    assert simple.complete([simple.tokenizer.bos_id, simple.tokenizer.unknown_id]).warnings == []


@torch.inference_mode()
def logprobs_of(server, ids):
    return server.model.logits(server.model.hidden(torch.tensor([ids])))[0].float().log_softmax(-1)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_a_prompt_is_repeated_with_its_logprobs(random, max_tokens, is_stream):
    text = "你好 1+1"
    ids = [random.tokenizer.bos_id, *random.tokenizer.encode(text).tolist()]
    asked = dict(max_tokens=max_tokens, echo=True, logprobs=2, temperature=0, stream=is_stream, n=2)
    replies = random.complete(text, **asked) if is_stream else [random.complete(text, **asked)]
    parts = [choice for reply in replies for choice in reply.choices if choice.index == 1]
    drawn = list(generate(random.model, ids, max_tokens, temperature=0))
    told = {
        name: sum((getattr(part.logprobs, name) for part in parts if part.logprobs), [])
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    whole = "".join(part.text for part in parts)
    assert whole == random.tokenizer.decode([*ids[1:], *drawn]) and whole.startswith(text)
    expected = logprobs_of(random, ids + drawn)[:-1]
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    right = expected[range(len(expected)), [*ids[1:], *drawn]].tolist()
    assert told["token_logprobs"][1:] == pytest.approx(right, abs=1e-4)
    for top, row in zip(told["top_logprobs"][1:], expected, strict=True):
        assert sorted(top.values())[-2:] == pytest.approx(row.topk(2).values.tolist()[::-1], abs=1e-4)
    assert told["tokens"][0] == "<|bos|>" and told["text_offset"][:2] == [0, 0]
    for name, offset in list(zip(told["tokens"], told["text_offset"], strict=True))[1 : len(ids)]:
        assert name.startswith("bytes:") or whole[offset:].startswith(name)
    if not is_stream:
        assert replies[0].usage.prompt_tokens == len(ids)


def test_a_prompt_is_repeated_without_logprobs(simple):
    for prompt in ("1+狐1", [2, *simple.tokenizer.encode("1+").tolist()]):
        text = simple.complete(prompt, echo=True, max_tokens=3, temperature=0).choices[0].text
        assert text == ("1+<|unknown|>1+1+" if isinstance(prompt, str) else "1+1+1")
    reply = simple.complete("1", max_tokens=0)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("", "length")
    full = [simple.tokenizer.bos_id] * 600  # nothing has to follow
    scored = simple.complete(full, max_tokens=0, echo=True, logprobs=0).choices[0].logprobs
    assert len(scored.token_logprobs) == 600
    with pytest.raises(openai.BadRequestError, match="no room"):
        simple.complete(full, max_tokens=1, echo=True)


def test_likelihoods_as_lm_eval_reads_them(random):
    """The requests of lm-evaluation-harness' `local-completions`, and its arithmetic on the responses."""
    texts = [("1+1=", "2"), ("你", "好吗？"), ("Hel", "lo?")]
    split = [[random.tokenizer.encode(part).tolist() for part in pair] for pair in texts]
    asked = {"model": "nano", "prompt": [a + b for a, b in split], "temperature": 0, "max_tokens": 1}
    reply = random.post(json=asked | {"logprobs": 1, "seed": 1234, "echo": True}).json()
    for choice, (context, continuation) in zip(reply["choices"], split, strict=True):
        values = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        rows = logprobs_of(random, context + continuation)[len(context) - 1 : -1]
        right = rows[range(len(continuation)), continuation]
        assert sum(values) == pytest.approx(right.sum().item(), abs=1e-3)
        is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        assert is_greedy == (rows.argmax(-1).tolist() == continuation)


@pytest.mark.slow
def test_lm_eval_itself_gets_the_numbers_of_evaluate(random, tmp_path):
    """The real client, from its command line; beside evaluation/harness.py on the model without a server."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from evaluation.harness import NanoLM
    from formats import huggingface

    generator = random.service.text_generator
    state = checkpoint(generator.tokenizer, generator.model.config, generator.model)
    huggingface.write(state, "the test", tmp_path / "exported")
    tasks = ["made_up_letters", "made_up_cloze", "made_up_generation"]
    model = f"base_url={random.url}/v1/completions,model=nano,tokenizer={tmp_path / 'exported'},max_length=96"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", ",".join(tasks)]
    command += ["--include_path", str(Path(__file__).parent / "evaluation" / "harness_tasks")]
    command += ["--model_args", f"{model},add_bos_token=True", "--log_samples", "--batch_size", "4"]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    lm = NanoLM(generator.model, generator.tokenizer)
    for task in tasks:
        (file,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        assert len(samples) >= 10
        for sample in samples:
            asked = [(*values.values(),) for values in sample["arguments"].values()]
            requests = [Instance("loglikelihood", {}, values, 0, (task, 0, 1)) for values in asked]
            if task == "made_up_generation":
                assert [reply for (reply,) in sample["resps"]] == lm.generate_until(requests)
                continue
            for ((logprob, is_greedy),), own in zip(sample["resps"], lm.loglikelihood(requests), strict=True):
                assert float(logprob) == pytest.approx(own[0], abs=1e-3)
                assert str(is_greedy) == str(own[1])


def test_the_end_of_a_text_is_scored_with_it(simple):
    """Even if <|eos|> comes first, one token with logprobs follows the prompt."""
    ids = simple.tokenizer.encode("你好吗").tolist()
    asked = dict(max_tokens=1, logprobs=1, temperature=0)
    reply = simple.complete(ids, echo=True, **asked)
    told = reply.choices[0].logprobs
    assert told.tokens == ["你", "好", "吗", "<|eos|>"] and told.text_offset == [0, 1, 2, 3]
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("你好吗", "stop")
    right = logprobs_of(simple, ids)[range(3), [*ids[1:], simple.tokenizer.eos_id]].tolist()
    assert told.token_logprobs[1:] == pytest.approx(right, abs=1e-4)
    chunks = simple.complete(ids, echo=True, stream=True, **asked)
    names = [name for chunk in chunks if (told := chunk.choices[0].logprobs) for name in told.tokens]
    assert names == ["你", "好", "吗", "<|eos|>"]
    assert simple.complete(ids, **asked).choices[0].logprobs.tokens == []
    stopped = simple.complete(ids[:1], echo=True, stop="好", **asked | {"max_tokens": 9}).choices[0]
    assert stopped.logprobs.tokens == ["你", "好"] and stopped.text == "你"


@pytest.mark.parametrize("name", ["simple", "random"])
def test_texts_to_tokens_and_back(name, request):
    server = request.getfixturevalue(name)
    text = "1+1=2 你好吗？\n" * 3
    ids = server.tokenizer.encode(text).tolist()
    reply = server.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert reply["tokens"] == [server.tokenizer.bos_id, *ids] and reply["count"] == len(ids) + 1
    assert reply["max_model_len"] == server.service.context and len(reply["token_strs"]) == len(ids) + 1
    reply = server.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert reply["tokens"] == ids and reply["token_strs"] is None
    assert server.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    assert server.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    count = server.post("/tokenize", json={"messages": HI}).json()["count"]
    assert count == server.chat(max_tokens=1).usage.prompt_tokens
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 1}),
        ("/tokenize", {"prompt": "1", "model": "gpt-4"}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {}),
    ):
        reply = server.post(path, json=body)
        assert reply.status_code == (404 if "model" in body else 400) and reply.json()["error"]["message"]


def test_a_long_text_is_encoded_piece_by_piece(random, monkeypatch):
    lengths, encode = [], random.service.encode_piece
    monkeypatch.setattr(
        random.service, "encode_piece", lambda piece: lengths.append(len(piece)) or encode(piece)
    )
    text = "1+1=2\n" * 60_000
    reply = random.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert reply["tokens"] == random.tokenizer.encode(text).tolist()
    assert sum(lengths) == len(text) and max(lengths) < 70_000
    reply = random.post("/tokenize", json={"prompt": "1" * 300_000})
    assert reply.status_code == 400 and "line break" in reply.json()["error"]["message"]


def test_no_piece_holds_a_part_of_a_character(tmp_path):
    tokenizer = BPETokenizer.train([TEXT], vocab_size=N_SPECIAL + 256)
    ids = tokenizer.encode("你吗").tolist()
    assert len(ids) == 6
    after = dict(zip([tokenizer.response_id, *ids], ids, strict=False))
    with served(tmp_path, checkpoint(tokenizer, *chain(tokenizer, after))) as server:
        chunks = [chunk.choices[0] for chunk in server.chat(temperature=0, stream=True, logprobs=True)]
        assert [chunk.delta.content for chunk in chunks] == ["", "你", "吗", None]
        told = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
        assert bytes(byte for token in told for byte in token.bytes).decode() == "你吗"
        cut = server.chat(temperature=0, max_tokens=4).choices[0]
        assert (cut.message.content, cut.finish_reason) == ("你\ufffd", "length")
        offsets = server.complete(ids[:1], max_tokens=4, temperature=0, logprobs=0).choices[0].logprobs
        assert offsets.tokens == ["bytes:\\xbd", "bytes:\\xa0", "bytes:\\xe5", "bytes:\\x90"]
        assert offsets.text_offset == [0, 0, 0, 1]


@pytest.mark.parametrize("is_stream", [False, True])
def test_logprobs_are_the_models(random, is_stream):
    ids, _ = render_chat(random.tokenizer, HI, add_generation_prompt=True)
    ids = ids.tolist()
    tokens = list(
        generate(random.model, ids, 9, seed=3, stop_tokens=random.service.text_generator.stop_tokens)
    )
    with torch.inference_mode():
        hidden = random.model.hidden(torch.tensor([ids + tokens]))
        logits = random.model.logits(hidden)[0, len(ids) - 1 : -1].float()
    values = logits.log_softmax(-1)
    best = values.topk(3)
    right = [row[token].item() for row, token in zip(values, tokens, strict=True)]

    replies = random.chat(max_tokens=9, seed=3, logprobs=True, top_logprobs=3, stream=is_stream)
    choices = [chunk.choices[0] for chunk in replies] if is_stream else [replies.choices[0]]
    told = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert [one.logprob for one in told] == pytest.approx(right, abs=1e-4)
    for one, top in zip(told, best.values.tolist(), strict=True):
        assert [pair.logprob for pair in one.top_logprobs] == pytest.approx(top, abs=1e-4)

    replies = random.complete(ids, max_tokens=9, seed=3, logprobs=3, stream=is_stream)
    choices = [chunk.choices[0] for chunk in replies] if is_stream else [replies.choices[0]]
    logprobs = [choice.logprobs for choice in choices if choice.logprobs]
    assert sum((one.token_logprobs for one in logprobs), []) == pytest.approx(right, abs=1e-4)
    assert all(3 <= len(top) <= 4 for one in logprobs for top in one.top_logprobs)
    assert [name for one in logprobs for name in one.tokens] == [
        pair.token if "\ufffd" not in pair.token else f"bytes:\\x{pair.bytes[0]:02x}" for pair in told
    ]


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("吗", "你好", "stop"),
        (["好吗", "?"], "你", "stop"),
        (["你好吗"], "", "stop"),
        (["吗？", "好！"], "你好吗", "stop"),
        ([], "你好吗", "stop"),
        ([*(f"{n}！" for n in range(63)), "好吗"], "你", "stop"),
    ],
)
def test_stop_strings(simple, stop, text, reason):
    choice = simple.chat(temperature=0, stop=stop).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text, reason)
    chunks = [chunk.choices[0] for chunk in simple.chat(temperature=0, stop=stop, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == text
    assert chunks[-1].finish_reason == reason


def test_a_stop_string_frees_the_slot(simple):
    answer = simple.complete("1", temperature=0, max_tokens=590, stop="1+1+1")
    assert answer.choices[0].text == "+" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 6
    simple.becomes(running=0)


def test_the_context_bounds_an_answer(simple):
    answer = simple.complete("1", temperature=0, max_tokens=10**6)
    assert answer.choices[0].finish_reason == "length" and answer.usage.total_tokens == 600


def test_a_conversation_that_is_too_long(simple):
    said = [HI[0], {"role": "assistant", "content": "1" * 100}] * 7 + HI
    with pytest.raises(openai.BadRequestError) as caught:
        simple.chat(said)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    answer = simple.chat(said, extra_body={"truncation": "auto"}, temperature=0)
    assert answer.choices[0].message.content == "你好吗"
    assert 0 < answer.dropped_messages < len(said) and answer.dropped_messages % 2 == 0
    assert simple.chat(extra_body={"truncation": "auto"}).dropped_messages == 0
    long = [{"role": "user", "content": "1" * 600}]
    for options in ({}, {"extra_body": {"truncation": "auto"}}):
        with pytest.raises(openai.BadRequestError, match="600 tokens; 602"):
            simple.chat(long, **options)
    with pytest.raises(openai.BadRequestError, match="leave no room"):
        simple.complete("1" * 599)


def test_a_pretrained_model_only_continues(tmp_path):
    with served(tmp_path, handmade("pretrain", 64)) as server:
        with pytest.raises(openai.BadRequestError, match="continues texts"):
            server.chat()
        assert server.complete("1", temperature=0, max_tokens=3).choices[0].text == "+1+"
        assert server.client.models.list().data[0].task == "pretrain"


# ---- requests that are refused


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": -2}, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        ({"n": 5}, "n", "at most 4"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"stop": ["1"] * 65}, "stop", "at most 64"),
        ({"stop": ["1", 2]}, "stop", "valid string"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"repetition_penalty": 0}, "repetition_penalty", "0.01"),
        ({"min_p": 2}, "min_p", "1"),
        ({"tools": [{"type": "function"}]}, "tools", "cannot call tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "cannot be held to a format"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "ids of tokens"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "ids of tokens"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "the ids are 0 to"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1,024"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
        ({"presence_penalty": -2.5}, "presence_penalty", "greater than or equal to -2"),
        ({"model": "gpt-4"}, "model", "only"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "wizard", "content": "1"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text"),
        ({"messages": [*HI, {"role": "system", "content": "1"}]}, "messages", "may only speak first"),
        ({"messages": [{"role": "system", "content": "1"}]}, "messages", "must follow the system message"),
    ],
)
def test_a_field_that_is_wrong(simple, fields, param, words):
    reply = simple.post("/v1/chat/completions", data=json.dumps({"messages": HI, **fields}),
                        headers={"Content-Type": "application/json"})  # fmt: skip
    error = reply.json()["error"]
    assert reply.status_code == (404 if param == "model" else 400)
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"]


def test_fields_that_are_ignored(simple):
    extra = {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "what": [1]}
    extra |= {"frequency_penalty": 0, "tools": [], "response_format": {"type": "text"}, "logit_bias": {}}
    extra |= {"tool_choice": "none", "parallel_tool_calls": True, "n": None, "stop": None}
    said = [{**HI[0], "name": "me"}]
    assert simple.chat(said, temperature=0, extra_body=extra).choices[0].message.content == "你好吗"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "at least 1"), ([[]], "at least 1"), ([999], "outside"), ([-1], "outside"), (["1"] * 5, "at most")],
)
def test_a_prompt_that_is_wrong(simple, prompt, words):
    with pytest.raises(openai.BadRequestError, match=words):
        simple.complete(prompt)


@pytest.mark.parametrize("field", [{"echo": 0.0}, {"suffix": "1"}, {"best_of": 2}, {"max_tokens": -2}])
def test_what_completions_do_not_offer(simple, field):
    reply = simple.post(json={"prompt": "1", **field})
    assert reply.status_code == 400 and [reply.json()["error"]["param"]] == list(field)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"prompt": "\\ud800", "max_tokens": 1}', 200),  # half a character is an unknown one
        (b'{"prompt": "1", "model": "\\ud800"}', 404),
        (b"", 400),
        (b"{", 400),
        (b"[1]", 400),
        (b'"1"', 400),
        (b'{"prompt": "\xff"}', 400),
        (b'{"prompt": NaN}', 400),
        (b'{"prompt": "1", "temperature": NaN}', 400),
        (b'{"prompt": "1", "temperature": 1e999}', 400),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"prompt": "1", "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "' + b"1" * 900_000 + b'"}', 400),
        (b'{"prompt": "' + b"1" * 10_000_000 + b'"}', 413),
    ],
)
def test_malformed_bodies(simple, body, status):
    headers = {"Content-Type": "application/json"}
    for data in (body, iter([body])):  # with its length told beforehand, and in chunks
        try:
            reply = simple.post(data=data, headers=headers)
        except requests.exceptions.ConnectionError:
            assert status == 413  # refused while it was still being sent
            continue
        assert reply.status_code == status
        assert status == 200 or isinstance(reply.json()["error"]["message"], str)


def test_head_requests(simple):
    """HEAD works wherever GET does."""
    for path, status in (
        ("/", 200),
        ("/health", 200),
        ("/v1/models", 200),
        ("/v1/none", 404),
        ("/v1/completions", 405),
    ):
        got, head = (requests.request(method, simple.url + path, timeout=20) for method in ("GET", "HEAD"))
        assert head.status_code == got.status_code == status and head.content == b""
        assert head.headers["content-length"] == str(len(got.content))


def test_routes_and_content_types_that_do_not_exist(simple):
    for reply, status in (
        (requests.get(simple.url + "/v1/none", timeout=20), 404),
        (requests.get(simple.url + "/v1/completions", timeout=20), 405),
        (requests.get(simple.url + "/../../etc/passwd", timeout=20), 404),
        (simple.post(data="prompt=1"), 400),
        (simple.post(data='{"prompt": "1"}', headers={"Content-Type": "text/plain"}), 400),
    ):
        assert reply.status_code == status and reply.json()["error"]["message"]


def test_malformed_heads(simple):
    assert simple.raw(b"\x16\x03\x01\r\n\r\n").startswith(b"HTTP/1.1 400")
    many = b"".join(b"X-%d: 1\r\n" % i for i in range(20_000))
    assert b" 200 " not in simple.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + many + b"\r\n")[:20]
    assert b" 403 " in simple.raw(b"GET /health HTTP/1.0\r\n\r\n")[:20]


# ---- access


def test_with_a_key(tmp_path):
    with served(tmp_path, handmade(block_size=64), api_key="the key") as server:
        assert server.chat(temperature=0).choices[0].message.content == "你好吗"
        for key in ("another", "the key2", "é"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert server.post(json={"prompt": "1"}, headers=headers).status_code == 401
        reply = requests.get(server.url + "/v1/models", timeout=20)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        for path in ("/", "/health"):
            assert requests.get(server.url + path, headers={"Host": "my.net"}, timeout=20).status_code == 200
        description = requests.get(server.url + "/openapi.json", timeout=20).json()
        assert "security" in description["paths"]["/v1/models"]["get"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:8000"}, 403),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:3000"}, 403),
        ({"Host": "localhost:8000", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost:8000", "Origin": "null"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://["}, 403),
    ],
)
def test_without_a_key_only_this_machine(simple, headers, status):
    reply = requests.get(simple.url + "/v1/models", headers=headers, timeout=20)
    assert reply.status_code == status
    assert not any(name.lower().startswith("access-control") for name in reply.headers)


def preflight(server, origin, **headers):
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST", **headers}
    return requests.options(server.url + "/v1/chat/completions", headers=headers, timeout=20)


@pytest.mark.parametrize("api_key", [None, "secret"])
def test_cors(tmp_path, api_key):
    """Exactly these origins are allowed; their pages can send requests and read the responses."""
    allowed, other = "https://my.example", "https://evil.example"
    with served(tmp_path, handmade(), api_key=api_key, cors=[allowed, "http://localhost:3000"]) as server:
        member = {"Authorization": "Bearer secret"} if api_key else {}
        asks = {"Access-Control-Request-Headers": "authorization, content-type, x-stainless-os"}
        reply = preflight(server, allowed, **asks)
        assert reply.ok and reply.headers["access-control-allow-origin"] == allowed
        assert "POST" in reply.headers["access-control-allow-methods"] and "Origin" in reply.headers["vary"]
        assert "x-stainless-os" in reply.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in reply.headers
        for origin in (
            other,
            "http://my.example",
            "https://my.example.evil.example",
            "https://my.example:8443",
            "null",
        ):
            assert not preflight(server, origin).ok
            assert "access-control-allow-origin" not in preflight(server, origin).headers
        for origin, status in (
            (allowed, 200),
            ("http://localhost:3000", 200),
            (other, 200 if api_key else 403),
        ):
            reply = requests.get(server.url + "/v1/models", headers={"Origin": origin, **member}, timeout=20)
            assert reply.status_code == status and "Origin" in reply.headers["vary"]
            assert (reply.headers.get("access-control-allow-origin") == origin) == (origin != other)
        # What went wrong can be read, too; and a name that was made to point here is refused whoever asks.
        if api_key:
            reply = requests.get(server.url + "/v1/models", headers={"Origin": allowed}, timeout=20)
            assert reply.status_code == 401
        else:
            named = {"Origin": allowed, "Host": "my.example"}
            reply = requests.get(server.url + "/v1/models", headers=named, timeout=20)
            assert reply.status_code == 403 and reply.json()["error"]["code"] == "foreign_host"
        assert reply.headers["access-control-allow-origin"] == allowed


def test_without_cors_other_origins_are_refused(simple):
    reply = preflight(simple, "https://my.example")
    assert reply.status_code == 403 and not any("access-control" in name.lower() for name in reply.headers)


def test_metrics(tmp_path):
    with served(tmp_path, handmade(), api_key="secret") as server:
        assert requests.get(server.url + "/metrics", timeout=20).status_code == 401
        server.chat(temperature=0)
        list(server.complete("1", max_tokens=7, temperature=0, stream=True))
        assert server.post(json={}, headers={"Authorization": "Bearer secret"}).status_code == 400
        requests.get(server.url + "/favicon.ico", timeout=20)
        reply = requests.get(server.url + "/metrics", headers={"Authorization": "Bearer secret"}, timeout=20)
        assert reply.headers["content-type"].startswith("text/plain; version=")
        values = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in prometheus_client.parser.text_string_to_metric_families(reply.text)
            for sample in family.samples
        }
    assert values["nano_requests_total", "/v1/chat/completions", "200"] == 1
    assert values["nano_requests_total", "/v1/completions", "200"] == 1
    assert values["nano_requests_total", "/v1/completions", "400"] == 1
    assert values["nano_requests_total", "401", "none"] == 2
    assert values["nano_completion_tokens_total",] == 3 + 7
    assert values["nano_prompt_tokens_total",] == 8 + 2
    assert values["nano_requests_running",] == values["nano_requests_waiting",] == 0
    assert values["nano_time_to_first_token_seconds_count",] == 2
    assert values["nano_step_seconds_count",] >= 4 + 7 - 1 and values["nano_step_seconds_sum",] > 0


# ---- failures


@pytest.fixture
def slowly(tmp_path):
    """A server with one slot, room for two to wait, and slow steps."""
    with served(tmp_path, handmade(), slots=1, max_queue=2, timeout=1.5) as server:
        step = server.service.engine.decoder.step
        server.service.engine.decoder.step = lambda: time.sleep(0.01) or step()
        yield server


LONG = {"prompt": "1", "max_tokens": 590, "temperature": 0}


def as_sent(ask):
    """The bytes of a request, for clients that misbehave."""
    body = json.dumps(ask).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_a_client_that_leaves_frees_its_slot(slowly):
    stream = slowly.post(json=LONG | {"stream": True}, stream=True)
    lines = stream.iter_lines()
    next(lines)
    whole, queued = (socket.create_connection(slowly.address) for _ in range(2))
    for connection in (whole, queued):
        connection.sendall(as_sent(LONG))
    slowly.becomes(running=1, waiting=2)
    queued.close()
    slowly.becomes(running=1, waiting=1)
    stream.close()
    slowly.becomes(running=1, waiting=0)
    whole.close()
    slowly.becomes(running=0, waiting=0)
    decoder = slowly.service.engine.decoder
    time.sleep(0.1)
    assert not decoder.is_busy and not slowly.service.engine._scheduled


def test_a_full_queue_and_the_timeout(slowly):
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(slowly.post(json=LONG))) for _ in range(3)]
    for thread in threads:
        thread.start()
    slowly.becomes(running=1, waiting=2)
    with pytest.raises(openai.RateLimitError) as caught:
        slowly.complete("1")
    assert caught.value.code == "overloaded" and caught.value.response.headers["retry-after"] == "1"
    for thread in threads:
        thread.join()
    assert [reply.status_code for reply in replies] == [504] * 3
    assert replies[0].json()["error"]["code"] == "timeout"
    with pytest.raises(openai.APIError, match="not finished after 1.5 s"):
        list(slowly.client.completions.create(model="nano", stream=True, **LONG))
    slowly.becomes(running=0, waiting=0)


def test_a_failing_step_ends_all_answers_and_shows_in_health(slowly):
    decoder = slowly.service.engine.decoder
    step, failure = decoder.step, RuntimeError("the card has left")
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(slowly.post(json=LONG))) for _ in range(3)]
    for thread in threads:
        thread.start()
    slowly.becomes(running=1, waiting=2)

    def fail():
        raise failure

    decoder.step = fail
    for thread in threads:
        thread.join()
    assert [reply.status_code for reply in replies] == [500] * 3
    assert "the card has left" in replies[0].json()["error"]["message"]
    assert requests.get(slowly.url + "/health", timeout=20).status_code == 503
    health = slowly.health()
    assert (health["status"], health["failures"]) == ("failed", 1) and "the card has left" in health["error"]
    decoder.step = step
    assert slowly.chat(temperature=0).choices[0].message.content == "你好吗"
    slowly.becomes(status="ok", failures=1, running=0)


def test_a_stopped_engine_ends_all_answers(tmp_path):
    with served(tmp_path, handmade(), slots=1) as server:
        stream = server.post(json=LONG | {"stream": True}, stream=True)
        lines = stream.iter_lines()
        next(lines)
        server.service.engine.stop()
        *_, error, done = filter(None, lines)
        assert "has been stopped" in error.decode() and done == b"data: [DONE]"
        assert server.post(json=LONG).status_code == 500
        assert server.health()["status"] == "failed"


def test_connections_that_stand_still_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(middleware, "BODY_TIMEOUT", 0.3)
    monkeypatch.setattr(connections, "IDLE_TIMEOUT", 0.3)
    with served(tmp_path, handmade()) as server:
        start = time.monotonic()
        assert server.raw(b"") == b""
        assert server.raw(b"GET /health HTT") == b""
        body = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
        assert b" 408 " in server.raw(body)
        assert time.monotonic() - start < 6
        # One that asks for much and reads nothing:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(server.address)
        connection.sendall(as_sent(LONG | {"stream": True, "logprobs": 5}))
        server.becomes(running=1)
        server.becomes(running=0)
        deadline = time.monotonic() + 10
        while len(server.connections) > 1:  # this one's own; the other was cut off, not waited for
            assert time.monotonic() < deadline
            time.sleep(0.05)
        connection.close()


# ---- limits on memory, time and connections


def chunked(n, size=60_000):
    """A body without a Content-Length."""
    return iter([b"1" * size] * (n // size))


JSON = {"Content-Type": "application/json"}
MB = 10**6
REFUSED = {
    "413": lambda server: server.post(data=b"1" * 2 * MB, headers=JSON),
    "413 in chunks": lambda server: server.post(data=chunked(2 * MB), headers=JSON),
    "403": lambda server: server.post(data=b"1" * MB, headers={**JSON, "Host": "evil.example"}),
    "400, no JSON": lambda server: server.post(data=b'{"prompt": "' + b"1" * MB, headers=JSON),
    "400, wrong type": lambda server: server.post(json={"prompt": [["1" * MB]]}),
    "400, too long": lambda server: server.post(json={"prompt": "1" * MB}),
    "400, plain text": lambda server: server.post(data=b"1" * MB),
    "400, a long conversation": lambda server: server.post(
        "/v1/chat/completions", json={"messages": HI * (MB // 50)}
    ),
    "404": lambda server: server.post("/v1/none", data=b"1" * MB, headers=JSON),
    "404, a model": lambda server: server.post(json={"prompt": "1", "model": "x" * MB}),
    "405": lambda server: server.post("/health", data=b"1" * MB, headers=JSON),
    "half a head": lambda server: server.raw(b"POST /v1/completions HTTP/1.1\r\nX: " + b"1" * 60_000),
    "half a body": lambda server: server.raw(as_sent({"prompt": "1" * MB})[:-1]),
    "no HTTP": lambda server: server.raw(b"\x16\x03\x01" * 20_000 + b"\r\n\r\n"),
}


def leave(server, data):
    """Send the data and close the connection."""
    with socket.create_connection(server.address, 10) as connection:
        connection.sendall(data)


@pytest.fixture
def uncollected():
    """Without the garbage collector: whatever should be freed must be freed by its reference count."""
    gc.collect()
    gc.disable()
    tracemalloc.start()
    yield tracemalloc
    tracemalloc.stop()
    gc.enable()


def settled(server):
    """Bytes in use once all requests are finished."""
    server.becomes(running=0, waiting=0)
    for _ in range(200):
        if len(server.connections) <= 1 and not server.service.n_reading:
            break
        time.sleep(0.02)
    time.sleep(0.05)
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_request_leaves_nothing_behind(simple, uncollected, monkeypatch, kind):
    monkeypatch.setattr(middleware, "BODY_TIMEOUT", 0.3)
    monkeypatch.setattr(connections, "IDLE_TIMEOUT", 0.3)
    n = 3 if "half" in kind or "long conv" in kind else 10

    def refuse():
        with contextlib.suppress(requests.exceptions.ConnectionError, BrokenPipeError):
            REFUSED[kind](simple)

    refuse()
    before = settled(simple)
    for _ in range(n):
        refuse()
    assert settled(simple) - before < n * 30_000


def test_a_request_without_the_key_leaves_nothing_behind(tmp_path, uncollected):
    with served(tmp_path, handmade(block_size=64), api_key="the key") as server:
        refuse = lambda: server.post(data=b"1" * MB, headers=JSON)  # noqa: E731
        assert refuse().status_code == 401
        before = settled(server)
        for _ in range(10):
            refuse()
        assert settled(server) - before < 10 * 30_000


def test_a_request_that_is_cut_off_or_overdue_leaves_nothing_behind(slowly, uncollected):
    data = as_sent({"prompt": "1" * 500, "max_tokens": 90, "user": "1" * MB})
    for size in (len(data) // 2, len(data)):
        leave(slowly, data[:size])
        before = settled(slowly)
        for _ in range(10):
            leave(slowly, data[:size])
        assert settled(slowly) - before < 10 * 30_000
    threads = [threading.Thread(target=lambda: slowly.post(json=LONG)) for _ in range(3)]
    for thread in threads:
        thread.start()
    slowly.becomes(running=1, waiting=2)
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(10):
        assert slowly.post(json={**LONG, "user": "1" * MB}).status_code == 429
    assert tracemalloc.get_traced_memory()[0] - before < 3 * MB
    for thread in threads:
        thread.join()


def test_a_body_in_very_many_chunks_is_not_parsed(simple):
    n_parts, next_event = 0, connections.ChunkCounter.next_event
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head = f"{head}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()

    def spy(parser):
        nonlocal n_parts
        n_parts += 1
        return next_event(parser)

    body = json.dumps({"prompt": "1+", "max_tokens": 1, "user": "1" * 10_000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    assert b" 200 OK" in simple.raw(head + chunks + b"0\r\n\r\n")[:20]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections.ChunkCounter, "next_event", spy)
        with contextlib.suppress(ConnectionError):
            assert simple.raw(head + chunks * 20) == b""
    assert n_parts < 30_000


@pytest.fixture
def busy_readers(simple):
    """Both reader threads are busy until the event is set."""
    free = threading.Event()
    for _ in range(2):
        simple.service.readers.submit(free.wait)
    yield free
    free.set()


def test_requests_that_nobody_waits_for_are_not_read(simple, busy_readers, monkeypatch):
    """Neither for a client that has left nor after the deadline; and never on the event loop."""
    read, readers = [], set()
    parse_request = openai_api.parse_request

    def spy(form, kind, body):
        readers.add(threading.current_thread().name.partition("_")[0])
        read.append(len(body))
        return parse_request(form, kind, body)

    monkeypatch.setattr(openai_api, "parse_request", spy)
    connection = socket.create_connection(simple.address)
    connection.sendall(as_sent({"prompt": "1" * 500}))
    while not simple.service.n_reading:
        time.sleep(0.01)
    assert simple.health()["status"] == "ok"
    connection.close()
    while simple.service.n_reading:
        time.sleep(0.01)
    monkeypatch.setattr(simple.service.engine, "timeout", 0.2)
    reply = simple.post(json={"prompt": "1" * 300})
    assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"
    monkeypatch.setattr(simple.service.engine, "timeout", 60)
    busy_readers.set()
    assert simple.complete("1+", max_tokens=2, temperature=0).choices[0].text == "1+"
    assert len(read) == 1 and read[0] < 200 and readers == {"reader"}


def test_too_many_requests_to_read_are_refused(simple, busy_readers):
    replies = []
    n = simple.service.engine.n_slots + simple.service.engine.max_queue
    ask = lambda: replies.append(simple.complete("1", max_tokens=1))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(n)]
    for thread in threads:
        thread.start()
    while simple.service.n_reading < n:
        time.sleep(0.01)
    assert simple.post(json={"prompt": "1"}).status_code == 429
    busy_readers.set()
    for thread in threads:
        thread.join()
    assert len(replies) == n


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [1] * 200_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * 200_000}]}),
        ("/v1/completions", {"prompt": [{}] * 200_000}),
        ("/v1/completions", {"prompt": [[1, ""]] * 100_000}),
        ("/v1/completions", {"prompt": [1] * 200_000 + [""]}),
        ("/v1/completions", {"prompt": "1", "stop": [1] * 200_000}),
        ("/v1/completions", {"prompt": "1", "logit_bias": {f"x{i}": "" for i in range(60_000)}}),
        ("/tokenize", {"messages": [[]] * 200_000}),
        ("/detokenize", {"tokens": [""] * 200_000}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_body_is_checked_up_to_its_first_mistakes(simple, monkeypatch, path, body):
    found, to_api_error = [], openai_api.to_api_error
    monkeypatch.setattr(
        openai_api, "to_api_error", lambda errors: found.append(len(errors)) or to_api_error(errors)
    )
    reply = simple.post(path, json=body)
    assert reply.status_code == 400 and len(reply.content) < 1000
    assert 1 <= found[0] <= 8


@pytest.mark.parametrize("auto", [True, False])
def test_a_conversation_is_encoded_as_far_as_it_may_fit(random, monkeypatch, auto):
    """It is not encoded again for every dropped turn, and not at all if it is certainly too long."""
    encoded, encode = [], random.tokenizer.encode_flat
    monkeypatch.setattr(random.tokenizer, "encode_flat", lambda texts: encoded.extend(texts) or encode(texts))
    roles = ("user", "assistant")
    asked = {"messages": [{"role": roles[i % 2], "content": "1"} for i in range(20_001)]}
    asked |= {"max_tokens": 1, "truncation": "auto" if auto else "disabled"}
    reply = random.post("/v1/chat/completions", json=asked)
    assert reply.status_code == (200 if auto else 400)
    assert len(encoded) < 96
    for text in ("1" * 900_000, "你" * 150_000):
        encoded.clear()
        assert random.post("/v1/completions", json={"prompt": text}).status_code == 400
        asked = {"messages": [{"role": "user", "content": text}], "truncation": "auto"}
        assert random.post("/v1/chat/completions", json=asked).status_code == 400
        assert encoded == []


def test_silent_connections_keep_nobody_out(tmp_path, caplog):
    """The one that has been silent longest is closed; one that is being answered is not."""
    with served(tmp_path, handmade(), slots=1) as server:
        step = server.service.engine.decoder.step
        server.service.engine.decoder.step = lambda: time.sleep(0.005) or step()
        server.listener.limit = 10
        stream = server.complete("1", max_tokens=590, temperature=0, stream=True)
        text = next(stream).choices[0].text
        silent = [socket.create_connection(server.address, 5) for _ in range(60)]
        for connection, data in zip(silent, (b"", b"GET / HTT", as_sent(LONG)[:-1]) * 20, strict=True):
            with contextlib.suppress(OSError):
                connection.sendall(data)
        assert server.health()["status"] == "ok"
        assert len(server.connections) <= 12
        assert text + "".join(chunk.choices[0].text for chunk in stream) == "+1" * 295
        for connection in silent:
            connection.close()
        server.becomes(running=0)
    assert not caplog.records


def test_a_connection_is_refused_while_all_others_are_answered(tmp_path):
    with served(tmp_path, handmade(), slots=2) as server:
        step = server.service.engine.decoder.step
        server.service.engine.decoder.step = lambda: time.sleep(0.01) or step()
        server.listener.limit = 2
        streams = [server.complete("1", max_tokens=300, temperature=0, stream=True) for _ in range(2)]
        for stream in streams:
            next(stream)
        with pytest.raises(requests.exceptions.ConnectionError):
            server.health()
        for stream in streams:
            assert "+" + "".join(chunk.choices[0].text for chunk in stream) == "+1" * 150
        server.becomes(running=0)


def test_accepting_is_retried_when_no_file_can_be_opened(tmp_path, monkeypatch, caplog):
    """It retries once a second, with one line in the log; open connections are served meanwhile."""
    with served(tmp_path, handmade()) as server, requests.Session() as session:
        assert session.get(server.url + "/health", timeout=20).ok
        calls, accept = [], socket.socket.accept

        def fails(listener):
            calls.append(time.monotonic())
            if len(calls) > 2:
                return accept(listener)
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(socket.socket, "accept", fails)
        with socket.create_connection(server.address, 20) as connection:
            assert session.get(server.url + "/health", timeout=20).ok
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in connection.recv(100)
        assert calls[2] - calls[0] > 1.8 and len(calls) < 9
        assert [record.getMessage() for record in caplog.records].count(
            "socket.accept() out of system resource"
        ) <= 2


# ---- the command line


def test_help_and_argument_errors(shared_project, tmp_path):
    run, start = shared_project.run, time.monotonic()
    help = run("serve.py", "--help")
    assert help.returncode == 0 and "NANO_API_KEY" in help.stdout and "examples" not in help.stderr
    assert time.monotonic() - start < 5  # half a second where nothing else runs
    (tmp_path / "no.pt").write_bytes(b"no checkpoint")
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for args, words in (
            (("--port", "70000"), "--port must be between"),
            (("--slots", "0"), "--slots must be"),
            (("--api_key", "two words"), "--api_key must be"),
            (("--cors", "https://my.example", "*"), "--cors takes origins"),
            (("--cors", "https://my.example/page"), "--cors takes origins"),
            (("-m", "none.pt"), "there is no file none.pt"),
            (("--host", "no.such.host.invalid"), "there is no such address"),
            (("--port", str(taken.getsockname()[1])), "address already in use"),
            (("--port", "0", "-m", str(tmp_path / "no.pt")), "is not a checkpoint of Nano"),
        ):
            process = run("serve.py", *args)
            assert process.returncode == 2, process
            assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
            assert words in process.stderr


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://My.Example:443", "https://my.example"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:80", "http://[::1]"),
        ("https://my.example:80", "https://my.example:80"),
        ("tauri://localhost", "tauri://localhost"),
    ],
)
def test_origins_are_compared_as_browsers_write_them(given, origin):
    assert serve.parse_origin(given) == origin


def test_on_a_network_with_a_key_until_sigterm(shared_project, tmp_path, monkeypatch):
    """Answers in progress are finished and the exit code is 0, even with very many connections."""
    monkeypatch.setattr(engine.checkpoint, "FOLDER", tmp_path)
    path, limits = handmade().save(), [(resource.RLIMIT_NOFILE, 96)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            shared_project.command("serve.py", "-m", path, "--host", "0.0.0.0", "--port", "0"),
            cwd=shared_project.elsewhere, env=shared_project.environment, stdout=subprocess.PIPE, stderr=log,
            text=True, preexec_fn=functools.partial(warm.limit, limits),
        )  # fmt: skip
    lines = {}
    for line in process.stdout:
        if match := re.match(r"(key|chat|API): +(\S+)", line):
            lines[match[1]] = match[2]
        if "API" in lines:
            break
    url = lines["API"].replace("0.0.0.0", "127.0.0.1")
    assert requests.get(url + "/models", timeout=20).status_code == 401
    client = openai.OpenAI(base_url=url, api_key=lines["key"], max_retries=0)
    stream = client.completions.create(model="nano", prompt="1", max_tokens=590, temperature=0, stream=True)
    text = next(stream).choices[0].text
    address = ("127.0.0.1", int(re.search(r":(\d+)/", url)[1]))
    silent = [socket.create_connection(address, 20) for _ in range(150)]
    assert requests.get(url.replace("/v1", "/health"), timeout=20).json()["status"] == "ok"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == "+1" * 295
    assert process.wait(20) == 0 and process.stdout.read() == "" and (tmp_path / "log").read_text() == ""
    assert len(silent) == 150


# ---- a fuzzer


def fuzz(operation, mode, n_examples):
    """Send n generated requests, check the responses against the schema, and return the status codes."""
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    seen = set()

    @given(operation.as_strategy(generation_mode=mode))
    @settings(max_examples=n_examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    def keeps_it(case):
        if mode.is_positive and isinstance(case.body, dict):
            case.body.pop("model", None)  # or all that would be tested is the answer 404
        # What is right in every field may yet be no conversation, or too long.
        reply = case.call_and_validate(excluded_checks=[positive_data_acceptance])
        assert reply.status_code < 500
        seen.add(reply.status_code)

    keeps_it()
    return seen


@pytest.mark.parametrize(
    "n_examples", [6, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_responses_match_the_openapi_description(random, n_examples):
    """No request makes the server fail, whether /openapi.json allows it or not."""
    schemathesis = pytest.importorskip("schemathesis")
    right, wrong = schemathesis.GenerationMode
    for result in schemathesis.openapi.from_url(f"{random.url}/openapi.json").get_all_operations():
        operation = result.ok()
        seen = fuzz(operation, right, n_examples)
        if operation.path == "/v1/completions":
            assert 200 in seen
        if operation.method == "post":
            assert 400 in fuzz(operation, wrong, n_examples)


# ---- a browser


@contextlib.contextmanager
def opened(browser, url, **options):
    """The chat page. It must request nothing from elsewhere and report no errors."""
    context = browser.new_context(**options)
    context.set_default_timeout(20_000)
    page, wrong = context.new_page(), []
    page.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith((url, "data:")) or wrong.append(request.url))
    page.goto(url)
    page.wait_for_selector("#facts dd", state="attached")
    yield page
    assert not [text for text in wrong if "400 (Bad Request)" not in text]  # a text that was too long
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()


def ask(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def answers(page):
    """All answers on the page, once the last one is complete."""
    page.wait_for_selector(".assistant:last-child .foot button")
    return page.locator(".assistant .words").all_inner_texts()


def test_a_conversation_on_the_page(browser, simple, tmp_path):
    with opened(browser, simple.url, locale="en-US") as page:
        assert "600" in page.inner_text("#cards") and page.get_attribute("html", "lang") == "en"
        ask(page, "Hello?")
        assert answers(page) == ["你好吗"]
        assert re.search(r"3 tokens · \d+ tokens/s · first after", page.inner_text(".assistant .foot"))
        assert "unknown" not in page.inner_text(".assistant .foot")
        page.keyboard.type("1+1")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("<b>2</b>")
        page.keyboard.press("Enter")
        assert answers(page) == ["你好吗"] * 2
        assert page.locator(".user .words").all_inner_texts() == ["Hello?", "1+1\n<b>2</b>"]

        page.locator("[aria-label='Answer again']").last.click()
        assert answers(page) == ["你好吗"] * 2
        page.locator("[aria-label=Edit]").first.click()
        page.fill(".editor textarea", "1+2")
        page.press(".editor textarea", "Enter")
        assert answers(page) == ["你好吗"]
        assert page.locator(".user .words").all_inner_texts() == ["1+2"]

        page.fill("#set-max_tokens", "2")
        page.fill("#set-system", "1")
        page.locator("[aria-label='Answer again']").click()
        assert answers(page) == ["你好"] and "cut off" in page.inner_text(".assistant .foot")
        page.screenshot(path=tmp_path / "desktop.png")
        page.reload()
        assert answers(page) == ["你好"] and page.input_value("#set-max_tokens") == "2"
        page.click("#new")
        assert page.locator(".message").count() == 0
        ask(page, "狐狸?")
        assert answers(page) == ["你好"]
        assert "2 characters are unknown to this model" in page.inner_text(".assistant .foot")
        page.click("#language")
        assert "有 2 个字符是模型不认识的" in page.inner_text(".assistant .foot")


def test_the_page_on_a_phone_in_chinese_and_dark(browser, simple, tmp_path):
    small = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}
    with opened(browser, simple.url, locale="zh-CN", color_scheme="dark", **small) as page:
        background = "getComputedStyle(document.body).backgroundColor"
        assert page.get_attribute("html", "lang") == "zh-CN" and "参数" in page.inner_text("#cards")
        dark = page.evaluate(background)
        page.click("#theme")
        assert page.evaluate(background) != dark
        ask(page, "Hello? " * 30)
        assert answers(page) == ["你好吗"] and "词元/秒" in page.inner_text(".assistant .foot")
        page.click("#knobs")
        page.wait_for_selector("#set-temperature", state="visible")
        page.screenshot(path=tmp_path / "phone.png")
        page.keyboard.press("Escape")
        page.wait_for_selector("#panel", state="hidden")
        page.click("#language")
        assert "tokens/s" in page.inner_text(".assistant .foot")
        ask(page, "1" * 900)
        assert answers(page)[0] == "你好吗" and "no room" in page.inner_text(".error:visible")
        ask(page, "Hello?")
        assert answers(page)[-1] == "你好吗"


def test_an_answer_is_stopped_on_the_page(browser, tmp_path):
    """With a pretrained model, whose texts the page continues, and a key, which the page asks for."""
    with served(tmp_path, handmade("pretrain"), slots=1, api_key="secret") as server:
        step = server.service.engine.decoder.step
        server.service.engine.decoder.step = lambda: time.sleep(0.02) or step()
        context = browser.new_context(locale="en-US")
        page = context.new_page()
        page.goto(server.url)
        for key in ("wrong", "secret"):
            page.fill("#keyField", key)
            page.press("#keyField", "Enter")
        page.wait_for_selector("#notice", state="visible")
        for stop in (lambda: page.keyboard.press("Escape"), lambda: page.click("[aria-label=Stop]")):
            ask(page, "1")
            page.wait_for_selector(".assistant:last-child .words:has-text('+1+')")
            stop()
            assert re.fullmatch(r"(\+1)+\+?", answers(page)[-1])
            assert "stopped" in page.locator(".assistant .foot").last.inner_text()
            server.becomes(running=0)
        context.close()


# ---- many at once


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [[], ["-q", "int8"]], ids=["float32", "int8"])
def test_thirty_two_clients_for_a_minute(shared_project, tmp_path, monkeypatch, quantize):
    """Every answer is the same as for a request that is alone, and memory does not grow.

    The reference is `generate`, or with int8, where activations are rounded, a BatchedDecoder with one slot.
    """
    import random as chance

    import psutil

    monkeypatch.setattr(engine.checkpoint, "FOLDER", tmp_path)
    path = at_random().save()
    env = shared_project.environment | {"NUMBA_DISABLE_JIT": "0"}
    # Now, or the memory that Numba takes would look like a leak.
    module = [sys.executable, "-m", "decoding.compiled_backend"]
    subprocess.run(module, cwd=shared_project.root, env=env, check=True)
    process = subprocess.Popen(
        shared_project.command("serve.py", "-m", path, "--port", "0", "--slots", "16", *quantize),
        cwd=shared_project.elsewhere, env=env, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    url = next(line.split()[1] for line in process.stdout if line.startswith("API"))
    model, tokenizer = engine.checkpoint.build(engine.checkpoint.load(path), path.name)
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    stops, cases = TextGenerator(model, tokenizer).stop_tokens, []
    alone = BatchedDecoder(to_int8(model)) if quantize else None
    if alone:
        alone.compile(wait=True)
    for i in range(60):
        ids, seed = [tokenizer.bos_id, *tokenizer.encode(TEXT[: i % 15]).tolist()], i
        stream, count = TextStream(tokenizer), 10 + i % 50
        options = [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}, {}][i % 3]
        options |= {"seed": seed, "stop_tokens": stops}
        if alone:
            alone.run([request := Request(ids, count, **options)])
        tokens = request.tokens if alone else list(generate(model, ids, count, **options))
        text = "".join(map(stream.feed, tokens)) + stream.end()
        del options["stop_tokens"]
        cases.append((dict(prompt=TEXT[: i % 15], max_tokens=count, **options), text))
    wrong, done, left, end = [], [], [], time.monotonic() + 60

    def talk(number):
        mine = chance.Random(number)
        while time.monotonic() < end and not wrong:
            try:
                ask, text = mine.choice(cases)
                kind = mine.random()
                if kind < 0.4:
                    said = client.completions.create(model="nano", **ask).choices[0].text
                else:
                    said = ""
                    with client.completions.create(model="nano", stream=True, **ask) as stream:
                        for chunk in stream:
                            said += chunk.choices[0].text
                            if kind > 0.9 and len(said) > 5:
                                break
                    if kind > 0.9:
                        left.append(text.startswith(said) or wrong.append((ask, said, text)))
                        continue
                done.append(said == text or wrong.append((ask, said, text)))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    memory, server = [], psutil.Process(process.pid)
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        memory.append(server.memory_info().rss / 2**20)
    health = requests.get(url.replace("/v1", "/health"), timeout=20).json()
    files = len(server.net_connections())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    print(f"{len(done)} answers, {len(left)} broken off, {health['tokens']} tokens, {files} sockets")
    print("MB:", [round(megabytes) for megabytes in memory[::5]])
    assert not wrong and len(done) > 100 and len(left) > 10
    assert (health["running"], health["waiting"], health["failures"]) == (0, 0, 0)
    assert max(memory[-5:]) < max(memory[10:20]) + 8
