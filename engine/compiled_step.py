"""`CompiledStep`: the threads, the weights and the memory that engine/compiled.py works with."""

import math
import queue
import threading
import time
import weakref

import numpy as np
import torch

from config.schema import ModelConfig
from engine.compile_cache import COMPILED
from engine.compiled import ASLEEP, BLOCK, STATE, Job, Scratch, Weights, follow, lead
from engine.quantize import GROUP, Int8Linear, quantize
from model import GPT

f32 = np.float32


class CompiledStep:
    """The steps of a model; see `engine.decoding.supports`.

    The model's matrices are moved to lie one after the other; the modules of the model look at them there,
    so nothing is in memory twice.
    """

    def __init__(self, model, n_threads=None):
        self.config, self.weights, self.scratches = model.config, weights_of(model), {}
        self.n_threads = n_threads or torch.get_num_threads()
        self.control = np.zeros(STATE + 8 * self.n_threads, np.int64)
        self.control[STATE::8] = ASLEEP
        self.n_jobs, self.current, self.cache = 0, [None], None
        self.bells = [queue.SimpleQueue() for _ in range(1, self.n_threads)]
        team = [
            threading.Thread(
                target=work, args=(self.current, bell, rank, self.n_threads), name="decoding", daemon=True
            )
            for rank, bell in enumerate(self.bells, 1)
        ]
        for thread in team:
            thread.start()
        weakref.finalize(self, dismiss, self.current, self.bells, team)  # also when the program ends

    def logits(self, tokens, cache):
        """The next tokens (list of n ids) of the first n rows of a cache, which grow by one -> logits [n, V].

        They are valid until the next call.
        """
        if self.cache is not cache or len(self.current[0].tokens) != len(tokens):
            self.cache, self.current[0] = cache, self.new_job(len(tokens), cache)
        job = self.current[0]
        job.tokens[:] = tokens
        while not lead(job, self.n_threads):
            for bell in self.bells:
                if bell.empty():
                    bell.put("wake up")
            time.sleep(0)  # lets them begin
        return torch.from_numpy(job.scratch.logits[: len(tokens), : self.config.vocab_size])

    def new_job(self, n, cache):
        """For n tokens."""
        self.n_jobs += 1
        return Job(
            self.n_jobs, self.control, np.zeros(n, np.int64), cache.lengths[:n], self.weights,
            cache.keys.numpy(), cache.values.numpy(), self.scratch(n), self.config.norm_eps,
        )  # fmt: skip

    def scratch(self, n):
        """Kept, as it holds the logits."""
        n_rows = n if n == 1 else -(-n // 8) * 8
        if n_rows not in self.scratches:
            c, unit = self.config, math.lcm(GROUP, BLOCK)
            heads = c.n_head * c.head_dim
            sizes = c.n_embd, heads + 2 * c.n_kv_head * c.head_dim, heads, 2 * c.n_hidden, c.vocab_size
            arrays = (np.zeros((n_rows, -(-size // unit) * unit), f32) for size in sizes)
            self.scratches[n_rows] = Scratch(*arrays)
        return self.scratches[n_rows]


def work(current, bell, rank, n_threads):
    """What a thread of the team does, until there is no current job when it is woken."""
    while bell.get() and current[0]:
        while (job := current[0]) and not follow(job, rank, n_threads):
            pass


def dismiss(current, bells, team):
    current[0] = None
    for thread, bell in zip(team, bells, strict=True):
        bell.put("go home")
        thread.join(1)


def warm_up(is_int8):
    """Have Numba compile `step`, or load what it compiled before, by a model that is as small as can be."""
    config = ModelConfig(block_size=2, n_layer=1, n_head=1, n_embd=2, n_hidden=2)
    model = GPT(config.resolved(vocab_size=2))
    steps = CompiledStep(quantize(model) if is_int8 else model, 1)
    steps.logits([0], model.new_cache())
    follow(steps.current[0], 0, 1)  # what the other threads of a team do


def weights_of(model):
    """The model's `Weights`."""
    c, blocks = model.config, model.blocks

    def together(tensors):
        """[L, ...], and the tensors' data is a part of it from now on."""
        first = tensors[0].detach().numpy()
        # NumPy asks Linux for large pages, PyTorch does not: they are read a tenth faster, or more.
        stack = np.empty((len(tensors), *first.shape), first.dtype)
        for tensor, part in zip(tensors, torch.from_numpy(stack), strict=True):
            tensor.data = part.copy_(tensor.detach())
        return stack

    def linear(modules):
        empty = np.empty((len(modules), 0), f32)
        bias = empty if modules[0].bias is None else together([m.bias for m in modules])
        if isinstance(modules[0], Int8Linear):
            return together([m.q for m in modules]), together([m.scales for m in modules]), bias
        return together([m.weight for m in modules]), empty, bias

    def gains(norms):
        return together([m.weight for m in norms]) if c.qk_norm else np.empty((c.n_layer, 0), f32)

    head = [matrix[0] for matrix in linear([model.lm_head])[:2]]  # before wte, which may be the same
    table = torch.stack((model.rotary_cos, model.rotary_sin)) if c.use_rope else torch.empty(2, 0, 0)
    return Weights(
        qkv=linear([b.attn.qkv for b in blocks]),
        proj=linear([b.attn.proj for b in blocks]),
        gate_up=linear([b.mlp.gate_up for b in blocks]),
        down=linear([b.mlp.down for b in blocks]),
        attn_norm=together([b.attn_norm.weight for b in blocks]),
        mlp_norm=together([b.mlp_norm.weight for b in blocks]),
        q_norm=gains([b.attn.q_norm for b in blocks]),
        k_norm=gains([b.attn.k_norm for b in blocks]),
        norm=model.norm.weight.detach().numpy(),
        wte=model.wte.weight.detach().numpy(),
        wpe=np.empty((0, 0), f32) if c.use_rope else model.wpe.weight.detach().numpy(),
        rotary=table.numpy(),
        head=(*head, np.empty(0, f32)),
        n_head=c.n_head,
        n_hidden=c.n_hidden,
    )


if __name__ == "__main__":
    warm_up(is_int8=False)
    warm_up(is_int8=True)
    COMPILED.touch()
