"""The answers of a model to a toy problem that it has learned (tasks/problems.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.problems import Problem
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from model import GPT


def answers(model: GPT, problem: Problem, tokenizer: Tokenizer, questions: Sequence[str]) -> list[str]:
    """The model's answer to each question, by greedy decoding. The model must be in eval()."""
    import numpy as np
    import torch

    texts = [question + problem.mark * problem.is_causal for question in questions]
    prompts = [torch.from_numpy(ids.astype(np.int64)) for ids in tokenizer.encode_batch(texts)]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=tokenizer.padding_id)
    ids = ids.to(model.device)
    if not problem.is_causal:
        return [tokenizer.decode(row) for row in model.transduce(ids).cpu()]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    cache, written = model.new_cache(len(prompts)), []
    with torch.inference_mode():
        last = model.hidden(ids, cache, lengths)[torch.arange(len(prompts), device=model.device), lengths - 1]
        for _ in range(problem.longest[1]):
            written.append(model.logits(last).argmax(-1, keepdim=True))
            last = model.hidden(written[-1], cache)[:, 0]
        written.append(model.logits(last).argmax(-1, keepdim=True))
    rows = torch.cat(written, 1).tolist()
    return [tokenizer.decode(row[: (row + [tokenizer.eos_id]).index(tokenizer.eos_id)]) for row in rows]
