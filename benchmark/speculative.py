"""How much speculative decoding gains: greedy text of a deepseek_v3 model, with and without its own drafts.

    python benchmark/speculative.py -m checkpoint/x.pt --text dataset/pretrain.txt
    python benchmark/speculative.py --text dataset/pretrain.txt          # trains a small model first: minutes

The prompts come from the last tenth of the text, which the model trained here has not seen. Both ways must
write the same tokens; this is checked. They take turns, because the speed of a machine drifts.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.config import display_path, resolve_path  # noqa: E402
from common.errors import UserError, run  # noqa: E402

if TYPE_CHECKING:
    from model import GPT
    from tokenizer import CharTokenizer

SHAPE = {"architecture": "deepseek_v3", "block_size": 256, "n_layer": 6, "n_head": 4, "n_embd": 128,
         "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
         "moe_intermediate_size": 64}  # fmt: skip
BATCH, RATE, WARM_UP, PROMPT = 8, 3e-3, 50, 32


def train(text: str, steps: int) -> tuple[GPT, CharTokenizer]:
    """Train a small model on a text, character by character."""
    import torch

    import models
    import objectives
    from tokenizer import CharTokenizer

    tokenizer = CharTokenizer.train([text])
    torch.manual_seed(0)
    model = models.build(models.check_config(SHAPE, "SHAPE").resolved(tokenizer.vocab_size))
    ids, size = torch.from_numpy(tokenizer.encode(text).astype("int64")), model.config.block_size
    objective = objectives.find("lm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99))
    for step in range(steps):
        starts = torch.randint(len(ids) - size - 1, (BATCH,)).tolist()
        batch = torch.stack([ids[start : start + size + 1] for start in starts])
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARM_UP, 1 - step / steps)
        y = batch[:, 1:]
        loss, _ = objective.loss(model, {"x": batch[:, :-1], "y": y, "mask": torch.ones_like(y).float()})
        (loss / y.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(lambda counts: counts)
    return model.eval(), tokenizer


def measure(model: GPT, prompts: list[list[int]], length: int) -> tuple[dict[str, float], int, int]:
    """Continue each prompt by `length` tokens, both ways.

    Returns ({way: seconds}, number of drafted tokens, number of those that were accepted).
    """
    from decoding.sampling import generate

    seconds, n_drafts, n_accepted = {"one at a time": 0.0, "drafted": 0.0}, 0, 0
    read: list[int] = []  # how many tokens each pass had
    hook = model.blocks[0].register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape[1]))
    for prompt in prompts:
        answers = []
        for way, draft in (("one at a time", False), ("drafted", True)):
            read.clear()
            start = time.perf_counter()
            answers.append(list(generate(model, prompt, length, temperature=0, draft=draft)))
            seconds[way] += time.perf_counter() - start
        if answers[0] != answers[1]:
            raise UserError("the drafted text differs: two tokens were equally likely up to rounding")
        n_drafts, n_accepted = n_drafts + read[1:].count(2), n_accepted + length - len(read)
    hook.remove()
    return seconds, n_drafts, n_accepted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", help="a checkpoint, instead of training one")
    parser.add_argument("--text", required=True, help="a file of UTF-8 text")
    parser.add_argument("--steps", type=int, default=600, help="training steps, without -m (600)")
    parser.add_argument("--prompts", type=int, default=20, help="how many texts to write (20)")
    parser.add_argument("--length", type=int, default=200, help="tokens of each, if the context allows (200)")
    args = parser.parse_args()
    if min(args.steps, args.prompts, args.length - 1) < 1:
        raise UserError("--steps and --prompts must be 1 or more, and --length 2 or more")

    from rich.console import Console
    from rich.table import Table

    from sources import texts_of

    text = "".join(texts_of([resolve_path(args.text)]))

    console, cut = Console(highlight=False), len(text) * 9 // 10
    if args.model:
        from engine.checkpoint import build, load

        model, tokenizer = build(load(resolve_path(args.model)), display_path(resolve_path(args.model)))
    else:
        with console.status("training ..."):
            model, tokenizer = train(text[:cut], args.steps)
    if getattr(model, "mtp", None) is None:
        raise UserError(f"{args.model} has no module that predicts the token after next")
    ids = tokenizer.encode(text[cut:]).tolist()
    length = min(args.length, model.config.block_size - PROMPT)
    if len(ids) < PROMPT * args.prompts or length < 2:
        raise UserError(f"{args.text} or the model's context is too short for prompts of {PROMPT} tokens")
    starts = [len(ids) * n // args.prompts for n in range(args.prompts)]
    measure(model, [ids[:PROMPT]], length)  # warms up
    seconds, n_drafts, n_accepted = measure(model, [ids[start : start + PROMPT] for start in starts], length)
    table = Table(title=f"{model.n_params / 1e6:.1f} M parameters, {args.prompts} texts of {length} tokens")
    for name in ("", "tokens/s", "gain", "drafts accepted", "tokens a pass"):
        table.add_column(name, justify="right" if name else "left")
    n_tokens, (first, _) = args.prompts * length, seconds.values()
    accepted = f"{n_accepted / max(1, n_drafts):.1%}", f"{n_tokens / (n_tokens - n_accepted):.2f}"
    for (way, taken), cells in zip(seconds.items(), (("", "1.00"), accepted), strict=True):
        table.add_row(way, f"{n_tokens / taken:.0f}", f"{first / taken:.2f}", *cells)
    console.print(table)


if __name__ == "__main__":
    run(main)
