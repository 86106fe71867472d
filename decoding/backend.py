"""What the batched decoder runs the model with: a `DecodeBackend`.

`TorchBackend` works for any model on any device. `CompiledBackend` (decoding/compiled_backend.py) is several
times as fast, but implements only the nano architecture in float32 or int8 on a CPU: `supports` decides.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from typing import Protocol

import numpy as np
import torch
from torch import nn

from common.config import ROOT
from config.validation import ANY, unsupported
from decoding.compile_cache import CACHE, is_compiled
from decoding.packed import Int8Linear, PackedLinear, TiedEmbedding
from model import GPT, MLP, Attention, Block, RMSNorm


class DecodeBackend(Protocol):
    """A model with a KV cache that has one row per text.

    lengths: [n_rows], how many tokens each row holds. capacity: how many fit into a row. max_logits: `extend`
    returns logits for at most this many tokens.
    """

    lengths: np.ndarray
    capacity: int
    max_logits: int

    def extend(self, row: int, tokens: list[int], return_logits: bool = False) -> torch.Tensor | None:
        """Append tokens to a row. Returns the logits [n, V] after each of them if asked, else None.

        They are valid until the next call.
        """

    def step(self, tokens: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Append one token to each of the first n rows.

        Returns (logits [n or more, V] of the next token in each row, its argmax in each of the n rows). The
        logits are valid until the next call.
        """

    def copy_row(self, source: int, target: int) -> None:
        """Overwrite row `target` with row `source`."""

    def clear_row(self, row: int) -> None:
        """Empty a row, for another text."""

    def refill(self, row: int, tokens: list[int]) -> None:
        """Replace the contents of a row."""
        self.clear_row(row)
        if tokens:
            self.extend(row, tokens)


class TorchBackend(DecodeBackend):
    """The model as it is, run by PyTorch."""

    def __init__(self, model: GPT, n_rows: int) -> None:
        self.model, self.cache = model, model.new_cache(n_rows)
        self.lengths, self.capacity = self.cache.lengths, self.cache.capacity
        self.max_logits = max(1, (1 << 22) // model.config.vocab_size)  # 16 MB of float32

    @torch.inference_mode()
    def extend(self, row: int, tokens: list[int], return_logits: bool = False) -> torch.Tensor | None:
        x = self.model.hidden(torch.tensor([tokens], device=self.model.device), self.cache.rows(row, row + 1))
        return self.model.logits(x[0]).float() if return_logits else None

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> tuple[torch.Tensor, list[int]]:
        n = len(tokens)
        cache = self.cache.rows(0, n, int(self.lengths[:n].max()) + 1)
        x = self.model.hidden(torch.tensor(tokens, device=self.model.device).unsqueeze(1), cache)
        logits = self.model.logits(x[:, -1]).float()
        # On a CPU, NumPy's argmax takes a hundredth of the time of PyTorch's.
        return logits, (logits.numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()

    def copy_row(self, source: int, target: int) -> None:
        self.cache.copy_row(source, target)

    def clear_row(self, row: int) -> None:
        self.cache.clear_row(row)


# ---- the compiled backend --------------------------------------------------------------------------

# What decoding/compiled.py implements: modules of these types, in a model with this configuration. Both are
# lists of what is known, so that a module or key that somebody adds to the model is left to PyTorch.
SUPPORTED_MODULES = {
    GPT, Attention, Block, MLP, RMSNorm, PackedLinear, Int8Linear, TiedEmbedding,
    nn.Dropout, nn.Embedding, nn.Identity, nn.Linear, nn.ModuleList,
}  # fmt: skip
IMPLEMENTED = {
    "architecture": ("nano",),
    "is_causal": (True,),
    **dict.fromkeys(
        ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "n_hidden",
         "bias", "use_rope", "rope_theta", "rope_scaling", "norm_eps", "qk_norm", "tie_embeddings",
         "dropout"),  # which only matters in training
        ANY,
    ),
}  # fmt: skip


def supports(model: GPT) -> bool:
    """Whether the compiled backend can run this model: all it consists of is known, and Numba is installed.

    NUMBA_DISABLE_JIT=1, which tells Numba not to compile anything, switches the compiled backend off.
    """
    return (
        {type(module) for module in model.modules()} <= SUPPORTED_MODULES
        and not unsupported(model.config, IMPLEMENTED, "decoding/compiled.py")
        and (model.device.type, model.dtype) == ("cpu", torch.float32)
        and importlib.util.find_spec("numba") is not None
        and os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"
    )


def weight_format(model: GPT) -> str:
    """ "float32" or "int8": the compiled backend has a compilation for each."""
    return "int8" if isinstance(model.lm_head, Int8Linear) else "float32"


_numba_lock = threading.Lock()  # held while Numba loads
atexit.register(_numba_lock.acquire)  # wait for it: a program that exited meanwhile would crash


def prepare(weights: str) -> None:
    """Compile for a weight format unless that has been done, then load the result.

    Compiling runs in a process of its own, which is not stopped when this program ends: the next one
    benefits.
    """
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
    except OSError:  # the result could not be kept
        return
    if not is_compiled(weights):
        command = [sys.executable, "-m", "decoding.compiled_backend", weights]
        subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True)
    if is_compiled(weights):
        with _numba_lock:
            try:
                from decoding import compiled_backend

                compiled_backend.warm_up(weights)
            except Exception:  # of any kind, if the cache is damaged; the next start compiles again
                shutil.rmtree(CACHE, ignore_errors=True)


def compiled_backend_for(model: GPT, n_rows: int) -> DecodeBackend | None:
    """The CompiledBackend of a model, or None if `prepare` has failed."""
    if not is_compiled(weight_format(model)):
        return None
    from decoding.compiled_backend import CompiledBackend

    return CompiledBackend(model, n_rows)
