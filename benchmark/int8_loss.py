"""What 8 bits cost: the loss of a model on held-out text, with weights in float32 and in int8.

    python benchmark/int8_loss.py -m checkpoint/x.pt --data dataset/prepared/pretrain_val.bin

The text is cut into blocks of the model's context length, and every token counts once. With int8, the loss is
also measured token by token with the compiled backend, which rounds activations to 16 bits.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.errors import UserError, run  # noqa: E402

if TYPE_CHECKING:
    import torch

    from model import GPT


def loss_of(model: GPT, tokens: torch.Tensor) -> float:
    """Loss in nats per token. tokens [N]"""
    import torch
    import torch.nn.functional as F

    def total_loss(x: torch.Tensor, y: torch.Tensor) -> float:
        return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten(), reduction="sum").item()

    size, total, n_rows = model.config.block_size, 0.0, 16
    n_targets = len(tokens) - 1
    with torch.inference_mode():
        # Whole blocks, many at a time, then the rest.
        n_blocks = n_targets // size
        inputs, targets = (tokens[i : i + n_blocks * size].view(-1, size) for i in (0, 1))
        for x, y in zip(inputs.split(n_rows), targets.split(n_rows), strict=True):
            total += total_loss(x, y)
        if n_left := n_targets - n_blocks * size:
            total += total_loss(tokens[-n_left - 1 : -1][None], tokens[-n_left:])
    return total / n_targets


def loss_of_compiled(model: GPT, tokens: torch.Tensor) -> float:
    """The same with the compiled backend"""
    import torch
    import torch.nn.functional as F

    from decoding.compiled_backend import CompiledBackend

    size, total, backend = model.config.block_size, 0.0, CompiledBackend(model, n_rows=64)
    inputs, targets = tokens[:-1].split(size), tokens[1:].split(size)
    for i in range(0, len(inputs), 64):
        # The last block may be shorter: its padding is read, but not counted.
        x, y = (torch.nn.utils.rnn.pad_sequence(part[i : i + 64], True, -1) for part in (inputs, targets))
        backend.lengths[:] = 0
        for t in range(x.shape[1]):
            logits, _ = backend.step(x[:, t].clamp(min=0).tolist())
            total += F.cross_entropy(logits[: len(x)], y[:, t], ignore_index=-1, reduction="sum").item()
    return total / (len(tokens) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("-m", "--model", required=True, metavar="FILE", help="a checkpoint")
    parser.add_argument("--data", required=True, metavar="FILE", help="a token file (.bin) of data.py")
    parser.add_argument("--limit", type=int, default=100_000, help="read at most this many tokens (100,000)")
    args = parser.parse_args()
    if args.limit < 2:
        raise UserError("--limit must be 2 or more")
    import torch

    from common.config import display_path, resolve_path
    from decoding.backend import supports
    from decoding.packed import quantize
    from engine import checkpoint
    from preparation.token_file import TokenFile

    loaded = checkpoint.load(resolve_path(args.model))
    model, tokenizer = checkpoint.build(loaded, display_path(resolve_path(args.model)))
    file = TokenFile(resolve_path(args.data), tokenizer.fingerprint)
    tokens = torch.from_numpy(file.tokens[: args.limit].astype("int64"))
    exact = loss_of(model, tokens)
    losses = {"int8": loss_of(quantize(model), tokens)}
    if supports(model):
        losses["int8, compiled"] = loss_of_compiled(model, tokens)
    print(f"{len(tokens) - 1:,} tokens, {model.n_params:,} parameters of {model.config.architecture}")
    print(f"{'float32':14}  loss {exact:.6f}  perplexity {math.exp(exact):.4f}")
    for name, loss in losses.items():
        change = math.expm1(loss - exact)
        print(f"{name:14}  loss {loss:.6f}  perplexity {math.exp(loss):.4f}  {change:+.4%}")


if __name__ == "__main__":
    run(main)
