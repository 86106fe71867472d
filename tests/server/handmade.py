"""A service whose model is made by hand: asked anything, it answers 你好吗; and 1+1+1+… continues forever."""

import contextlib
import time

from test_inference import chain, checkpoint

from decoding.engine import Request
from decoding.text_generator import TextGenerator
from engine.checkpoint import build
from server.scheduler import InferenceEngine
from server.service import Service
from tokenizer import CharTokenizer


@contextlib.contextmanager
def handmade_service(folder):
    tokenizer = CharTokenizer.train(["你好吗？Hello? 1+2=3\n"])
    ni, hao, ma, one, plus = tokenizer.encode("你好吗1+").tolist()
    after = {tokenizer.response_id: ni, ni: hao, hao: ma, tokenizer.bos_id: one, one: plus, plus: one}
    saved = checkpoint(tokenizer, *chain(tokenizer, after, 100))
    model, tokenizer = build(saved, "by hand")
    path = folder / "handmade.pt"
    path.touch()
    engine = InferenceEngine(model, n_slots=2, max_queue=2, timeout=20)
    engine.start()
    yield Service(saved, path, TextGenerator(model, tokenizer), engine, "cpu")
    engine.stop()
    assert not engine.is_alive()


def request_of(service, text, max_tokens):
    """A greedy request for the service's engine."""
    return Request(
        [service.tokenizer.bos_id, *service.tokenizer.encode(text).tolist()], max_tokens, temperature=0
    )


def slow_down(service, seconds):
    """Make every step of the model take that long, or longer."""
    step = service.engine.decoder.step
    service.engine.decoder.step = lambda: time.sleep(seconds) or step()


def break_down(service):
    """Make every step of the model fail."""

    def step():
        raise RuntimeError("the card has left")

    service.engine.decoder.step = step
