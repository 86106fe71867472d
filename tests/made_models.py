"""Models and tasks that are made by hand.

Most of the models know for each token which one comes next, and nothing else: their answers are known.
"""

import torch

from config.schema import ModelConfig
from engine.checkpoint import Checkpoint
from model import GPT
from tasks import Example, Task
from tokenizer import CHAT_TEMPLATE

TEXT = "你好吗？Hello? 1+2=3\n"


def chain(tokenizer, after, block_size=64):
    """The state of a model that always follows token t by after[t] (ids), others by <|eos|>."""
    n = tokenizer.vocab_size
    config = ModelConfig(
        n_layer=1, n_head=1, n_embd=-(-n // 2) * 2, block_size=block_size, tie_embeddings=False
    ).resolved(n)
    model = GPT(config)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.down.weight.zero_()
        model.wte.weight.copy_(torch.eye(n, config.n_embd))
        model.lm_head.weight.zero_()
        for token in range(n):
            model.lm_head.weight[after.get(token, tokenizer.eos_id), token] = 100.0
    return config, model


def bigram(tokenizer, logprobs, block_size=64):
    """The state of a model that gives the token after t the log-probabilities logprobs[t] [V, V]."""
    config, model = chain(tokenizer, {}, block_size)
    scale = (1 / config.n_embd + config.norm_eps) ** 0.5  # of a vector with a single 1, by the last norm
    with torch.no_grad():
        model.lm_head.weight[:, : len(logprobs)] = torch.as_tensor(logprobs).T * scale
    return config, model.eval()


def checkpoint(tokenizer, config, model, **fields):
    loss = {"loss": 0.125, "step": 7}
    values = {
        "stage": "sft",
        "run": "20260102_030405",
        "step": 7,
        "best": loss,
        "validation": loss,
        "chat_template": CHAT_TEMPLATE,
        **fields,
    }
    return Checkpoint(
        model_config=config.model_dump(),
        train_config={},
        tokenizer=tokenizer.to_dict(),
        model=model.state_dict(),
        optimizer={},
        **values,
    )


def polite(tokenizer, **fields):
    """Answers every question, and continues every 你, with 好吗."""
    ni, hao, ma = tokenizer.encode("你好吗").tolist()
    after = {tokenizer.response_id: hao, tokenizer.bos_id: hao, ni: hao, hao: ma}
    return checkpoint(tokenizer, *chain(tokenizer, after), **fields)


def small_model(tokenizer, block_size=64, **fields):
    torch.manual_seed(5)
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=block_size, **fields)
    model = GPT(config.resolved(tokenizer.vocab_size)).eval()
    for weights in model.parameters():  # a new model's own small weights would repeat one token
        torch.nn.init.normal_(weights, std=0.3)
    return model


class Listed(Task):
    """Examples for a test."""

    name = "listed"

    def __init__(self, examples, metric="exact"):
        self.list, self.metric = [Example(*example) for example in examples], metric

    def examples(self, split, seed):
        yield from self.list
