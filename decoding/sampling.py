"""Draw tokens from logits, and `generate`: continue one text, token by token.

`generate` is the plain way to write text, and the reference that the batched decoder (decoding/engine.py) and
the compiled backend (decoding/compiled.py) are tested against.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from model import GPT, Cache


@torch.inference_mode()
def generate(
    model: GPT,
    tokens: Iterable[int],
    max_tokens: int,
    *,
    stop_tokens: Container[int] = (),
    seed: int | None = None,
    draft: bool = True,
    **options: Any,
) -> Iterator[int]:
    """Continue `tokens` (ids), yielding one id at a time, at most `max_tokens` of them.

    options: those of `logits_to_probs`: temperature (0 is greedy), top_k, ... Ends before a stop token.
    When the context is full, the older half of it is dropped. Call model.eval() first.
    Raises ValueError for a prompt that `check_prompt` refuses and for options that `logits_to_probs` refuses.

    draft: greedy text without penalties may use speculative decoding if the architecture has a `drafter`. It
    gives the same tokens, sooner (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative
    Decoding").
    """
    context, device = check_prompt(model, tokens), model.device
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    counts = TokenCounts(context, model.config.vocab_size, device) if has_penalty(options) else None
    draft = draft and is_greedy(options)
    cache: Cache | None = None
    pending: list[int] = []  # tokens of the text that the cache does not hold yet
    guesses: list[int] = []  # drafted tokens after them
    while max_tokens > 0:
        if cache is None or cache.lengths[0] + len(pending) > cache.capacity:
            keep = model.config.block_size if cache is None else max(1, model.config.block_size // 2)
            pending, guesses = context[-keep:], []
            cache, drafter = model.new_cache(), model.drafter() if draft else None
        # Reading a few guesses together with the last token takes hardly longer than reading the token alone.
        room = min(max_tokens, cache.capacity - int(cache.lengths[0]))
        read = pending + guesses[: room - len(pending)]
        x = model.hidden(torch.tensor([read], device=device), cache)
        n_right = len(pending)  # how many of the tokens in `read` belong to the text
        for logits in model.logits(x[0, n_right - 1 :]).float():
            token = sample(logits, generator, counts=counts, **options)
            if token in stop_tokens:
                return
            yield token
            context.append(token)
            if counts:
                counts.add(token)
            max_tokens -= 1
            if read[n_right : n_right + 1] != [token]:
                break  # the guesses are used up, or this one was wrong, and so are the logits after it
            n_right += 1
        if n_right < len(read):
            cache.advance(n_right - len(read))
        if drafter:
            guesses = drafter(x[:, :n_right], torch.tensor([context[-n_right:]], device=device))
        pending = [token]


def check_prompt(model: GPT, tokens: Iterable[int]) -> list[int]:
    """Return the ids as a list of int. Raises ValueError if it is empty or an id is not in the vocabulary."""
    context = [int(token) for token in tokens]
    if not context:
        raise ValueError("the prompt holds no token")
    if not 0 <= min(context) <= max(context) < model.config.vocab_size:
        raise ValueError(f"the prompt holds a token id outside 0 .. {model.config.vocab_size - 1}")
    return context


class TokenCounts:
    """Which tokens a text contains, for the penalties of `logits_to_probs`: two tensors [V].

    seen: whether the token occurs in prompt or answer. drawn: how often it occurs in the answer.
    """

    def __init__(self, prompt: Iterable[int], vocab_size: int, device: torch.device | None = None) -> None:
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.drawn = torch.zeros(vocab_size, device=device)
        self.seen[torch.tensor([*prompt], dtype=torch.long, device=device)] = True

    def add(self, token: int) -> None:
        """Count a token that was drawn."""
        self.seen[token] = True
        self.drawn[token] += 1


def has_penalty(options: dict[str, Any]) -> bool:
    """Whether these options of `logits_to_probs` depend on which tokens the text contains."""
    is_on = options.get("frequency_penalty") or options.get("presence_penalty")
    return bool(is_on) or options.get("repetition_penalty", 1.0) != 1.0


def is_greedy(options: dict[str, Any]) -> bool:
    """Whether these options always choose the token with the largest logit.

    False if an option is set that this function does not know, since it may change the logits.
    """
    known = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    others = any(value for name, value in options.items() if name not in known)
    return options.get("temperature") == 0 and not others and not has_penalty(options)


def sample(logits: torch.Tensor, generator: torch.Generator | None = None, **options: Any) -> int:
    """Draw one token id from logits [V]. The options are those of `logits_to_probs`.

    generator: a generator on the CPU. Numbers are drawn there whatever the device of the model, so that a
    seed gives the same text on all of them.
    """
    probabilities, ids = logits_to_probs(logits, **options)
    if len(ids) == 1:
        return int(ids)
    # Inverse transform sampling: torch.multinomial takes ten times as long for a large vocabulary.
    cumulative = probabilities.cpu().cumsum(0, dtype=torch.float64)
    drawn = cumulative[-1] * torch.rand(1, generator=generator, dtype=torch.float64)
    return int(ids[torch.searchsorted(cumulative, drawn, right=True)])


def logits_to_probs(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    logit_bias: dict[int, float] | None = None,
    counts: TokenCounts | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [V] -> (probabilities [K], not normalised, ids [K]) of the tokens that may be drawn.

    temperature: divides the logits; 0 leaves only the likeliest token. top_k: keep the k likeliest tokens.
    top_p: keep the likeliest tokens that together have this probability (Holtzman et al. 2020, nucleus
    sampling). min_p: keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024).
    repetition_penalty: positive logits of tokens in the text are divided by it, negative ones multiplied
    (Keskar et al. 2019, CTRL, section 4.1). frequency_penalty is subtracted from a token's logit once for
    each time it was drawn, presence_penalty once if it was drawn at all (as in OpenAI's API, the prompt does
    not count). logit_bias {id: number} is added last. counts: the TokenCounts of the text; penalties need it.
    Raises ValueError for a setting out of range.
    """
    top_k, top_p, min_p = top_k or 0, 1 if top_p is None else top_p, min_p or 0
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1 and repetition_penalty > 0):
        raise ValueError("needs temperature >= 0, top_k >= 0, 0 < top_p <= 1 and repetition_penalty > 0")
    if not 0 <= min_p <= 1:
        raise ValueError("needs 0 <= min_p <= 1")
    if not (math.isfinite(frequency_penalty) and math.isfinite(presence_penalty)):
        raise ValueError("needs a finite frequency_penalty and presence_penalty")
    if counts and repetition_penalty != 1.0:
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(counts.seen, penalized, logits)
    if counts and (frequency_penalty or presence_penalty):
        logits = logits - (frequency_penalty * counts.drawn + presence_penalty * (counts.drawn > 0))
    if logit_bias:
        if not (0 <= min(logit_bias) <= max(logit_bias) < len(logits)):
            raise ValueError(f"logit_bias holds a token id outside 0 .. {len(logits) - 1}")
        biased = torch.tensor([*logit_bias], device=logits.device)
        bias = torch.tensor([*logit_bias.values()], dtype=logits.dtype, device=logits.device)
        logits = logits.index_add(0, biased, bias)
    if temperature < 1e-6:  # 0, or so small that dividing by it would overflow
        return logits.new_ones(1), logits.argmax(-1, keepdim=True)
    if 0 < top_k < logits.numel():
        logits, ids = logits.topk(top_k)
    else:
        ids = torch.arange(logits.numel(), device=logits.device)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        for n in (2048, len(ids)):  # sorting a whole vocabulary takes thirty times as long
            likeliest, order = probabilities.topk(min(n, len(ids)))
            if likeliest.sum() >= top_p:
                break
        probabilities, ids = likeliest, ids[order]
        # A token stays if those before it have less than top_p together. So the first one always stays.
        probabilities[1:][probabilities.cumsum(0)[:-1] >= top_p] = 0
    if min_p:
        probabilities = probabilities.where(probabilities >= min_p * probabilities.max(), 0)
    return probabilities, ids
