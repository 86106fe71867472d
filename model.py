"""The Nano transformer, from its building blocks up.

A decoder-only transformer in the style of Llama and Qwen3. Each block adds attention and then an MLP to the
stream of token vectors, and each of the two reads the stream through an RMSNorm:

    tokens [B, T] -> embedding [B, T, C] -> n_layer x Block -> RMSNorm -> logits [B, T, V]

Good to know before you read on:
- Positions are rotary (RoPE), or learned if `use_rope` is false.
- With `n_kv_head` < `n_head`, groups of query heads share keys and values (grouped-query attention), and the
  KV cache holds only `n_kv_head` heads.
- Queries, keys and values come from one matrix, and so do both halves of the gated MLP: a few large matrix
  products are faster than many small ones.
- The model computes vectors and logits. What to do with them is up to an objective (objectives/).
- Attention and the output loss have faster versions for training on a CPU: common/kernels.py, switched on by
  `use_custom_kernels`. Everything else is plain PyTorch.
- Other architectures are subclasses of `GPT` in models/ that replace some of its parts.

Shapes: B rows, T tokens, C = n_embd, H = n_head, G = n_kv_head, D = head_dim, V = vocab_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import kernels
from config.schema import Llama3Rope, YarnRope

# ---- norm and positions ----------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotary_table(
    head_dim: int, length: int, theta: float, scaling: Llama3Rope | YarnRope | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each [length, head_dim / 2], float32.

    Pair i rotates by position * theta^(-2i / D) (Su et al. 2021, "RoFormer", section 3.4.2).
    scaling: the configuration's rope_scaling.
    """
    # Computed on the CPU for every device, so that the tables are the same everywhere.
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = theta ** -(pairs / head_dim)
    if scaling:
        frequencies = scale_frequencies(frequencies, theta, scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), frequencies)
    return angles.cos(), angles.sin()


def scale_frequencies(frequencies: Tensor, theta: float, scaling: Llama3Rope | YarnRope) -> Tensor:
    """Rotary frequencies [D / 2] for a context `factor` times longer than the one used in pretraining.

    Pairs that rotate often within the original context keep their frequency, pairs that hardly rotate are
    slowed down by `factor`, and a ramp connects the two: linear in the number of rotations for Llama 3.1,
    linear in the index of the pair for YaRN (Peng et al. 2023, "YaRN", section 3.2).
    """
    context = scaling.original_max_position_embeddings
    if isinstance(scaling, Llama3Rope):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = (context * frequencies / (2 * math.pi) - low) / (high - low)
    else:

        def pair_with(rotations: float) -> float:
            return len(frequencies) * math.log(context / (rotations * 2 * math.pi)) / math.log(theta)

        first = max(math.floor(pair_with(scaling.beta_fast)), 0)
        last = min(math.ceil(pair_with(scaling.beta_slow)), 2 * len(frequencies) - 1)
        keep = 1 - (torch.arange(len(frequencies), device="cpu") - first) / max(last - first, 0.001)
    keep = keep.clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)


def attention_factor(scaling: Llama3Rope | YarnRope | None) -> float:
    """YaRN's factor on queries and keys for a longer context (YaRN, section 3.4, equation 22)."""
    return 0.1 * math.log(scaling.factor) + 1 if isinstance(scaling, YarnRope) else 1.0


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x [B, T, heads, D] by the angles [..., T, 1, D/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass(frozen=True)
class PositionInfo:
    """Where the tokens of a forward pass stand. Every layer gets it.

    positions  [1 or B, T]
    mask       [1 or B, 1, 1 or T, S], true where a token may look; None: the usual causal (or full) attention
    rotary     cos and sin at these positions, [1 or B, T, 1, D/2] each; None without RoPE
    past       how many tokens every row of the cache already holds; None where the rows differ
    lengths    [B]: how many of the T tokens of each row are real, the rest being padding; None: all
    shared     what a layer leaves for later layers of the same pass, such as keys that they share
    """

    positions: Tensor
    mask: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    past: int | None = 0
    lengths: Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict)


# ---- the cache -------------------------------------------------------------------------------------


class LayerCache(Protocol):
    """What one layer remembers of the tokens it has seen. A block makes its own: `Block.new_cache`."""

    def rows(self, first: int, last: int, capacity: int | None) -> "LayerCache":
        """Rows first .. last - 1, and at most `capacity` tokens of each; shares memory with this one."""

    def copy_rows(self, source: Any, rows: list[int], length: int) -> None:
        """Overwrite row i with row rows[i] of `source`, for all i; they hold at most `length` tokens."""

    def clear_row(self, row: int) -> None:
        """Prepare a row to be filled from its beginning."""


class KVCache:
    """Keys and values of one attention layer: [B, heads, capacity, size of a key or a value] each."""

    def __init__(
        self, batch_size: int, heads: int, capacity: int, key_size: int, value_size: int,
        device: Any = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        self.keys = torch.zeros(batch_size, heads, capacity, key_size, device=device, dtype=dtype)
        self.values = torch.zeros(batch_size, heads, capacity, value_size, device=device, dtype=dtype)

    def update(self, k: Tensor, v: Tensor, info: PositionInfo) -> tuple[Tensor, Tensor]:
        """Store k, v [B, heads, T, size]; returns all keys and values up to the last one stored."""
        if info.past is not None:
            end = info.past + k.shape[2]
            self.keys[:, :, info.past : end] = k
            self.values[:, :, info.past : end] = v
            return self.keys[:, :, :end], self.values[:, :, :end]
        index = info.positions[:, None, :, None]
        self.keys.scatter_(2, index.expand_as(k), k.to(self.keys.dtype))
        self.values.scatter_(2, index.expand_as(v), v.to(self.values.dtype))
        return self.keys, self.values

    def rows(self, first: int, last: int, capacity: int | None) -> "KVCache":
        part = object.__new__(KVCache)
        part.keys = self.keys[first:last, :, :capacity]
        part.values = self.values[first:last, :, :capacity]
        return part

    def copy_rows(self, source: "KVCache", rows: list[int], length: int) -> None:
        self.keys[:, :, :length] = source.keys[rows, :, :length]
        self.values[:, :, :length] = source.values[rows, :, :length]

    def clear_row(self, row: int) -> None:
        pass  # what lies beyond a row's length is never read


class Cache:
    """What a model remembers of the texts it has read, so that only new tokens need to be computed.

    layers    one entry a layer, made by its block; None where a layer needs none
    capacity  tokens that fit into a row
    lengths   [B], on the host: how many tokens each row holds; rows may differ
    """

    def __init__(self, layers: list[LayerCache | None], batch_size: int, capacity: int):
        self.layers, self.capacity = layers, capacity
        self.lengths = np.zeros(batch_size, np.int64)

    @property
    def uniform_length(self) -> int | None:
        """The length of all rows; None where they differ."""
        first, *others = self.lengths.tolist()
        return first if others.count(first) == len(others) else None

    def rows(self, first: int, last: int, capacity: int | None = None) -> "Cache":
        """Rows first .. last - 1, and at most `capacity` tokens of each: a cache that shares their memory."""
        layers = [layer and layer.rows(first, last, capacity) for layer in self.layers]
        part = Cache(layers, 0, self.capacity if capacity is None else min(capacity, self.capacity))
        part.lengths = self.lengths[first:last]
        return part

    def copy_rows(self, source: "Cache", rows: list[int]) -> None:
        """Overwrite row i with row rows[i] of `source`, for all i."""
        self.lengths[:] = source.lengths[rows]
        for layer, other in zip(self.layers, source.layers, strict=True):
            if layer is not None:
                layer.copy_rows(other, rows, int(self.lengths.max()))

    def copy_row(self, source: int, target: int) -> None:
        self.rows(target, target + 1).copy_rows(self, [source])

    def clear_row(self, row: int) -> None:
        self.lengths[row] = 0
        for layer in filter(None, self.layers):
            layer.clear_row(row)

    def advance(self, counts: int | Tensor) -> None:
        """Add `counts` to the lengths: an int, or a tensor [B] if the rows differ; negative ones shorten."""
        self.lengths += counts if isinstance(counts, int) else counts.cpu().numpy()


# ---- what a token costs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """What one token costs in a part of the network, counted from the shapes; costs can be added.

    weights          weights of the matrices it is multiplied with, 2 FLOPs each in the forward pass
    attention_flops  FLOPs of queries times keys, and of attention weights times values
    activations      numbers kept for the backward pass (an estimate: kernels keep copies of their own)
    attention_scores numbers kept besides, where the attention weights themselves are kept
    """

    weights: int = 0
    attention_flops: int = 0
    activations: int = 0
    attention_scores: int = 0

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Costs)))


def linear_weights(module: nn.Module) -> int:
    """How many weights all linear layers of a module hold, packed ones (decoding/packed.py) included."""
    modules: Any = module.modules()
    layers = (m for m in modules if hasattr(m, "in_features") and hasattr(m, "out_features"))
    return sum(m.in_features * m.out_features for m in layers)


# ---- the network -----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention with grouped keys and values (Ainslie et al. 2023)."""

    custom_kernels = False  # see GPT.use_custom_kernels

    def __init__(self, config: Any):
        super().__init__()
        self.n_head, self.is_causal = config.n_head, config.is_causal
        self.dropout = nn.Dropout(0.0)  # of the attention weights; see GPT.set_dropout
        self.make_projections(config)

    def make_projections(self, config: Any) -> None:
        """The layers from x to queries, keys and values, and from the heads back."""
        self.n_kv_head, self.head_dim = config.n_kv_head, config.head_dim
        self.n_query = config.n_head * config.head_dim
        self.n_qkv = self.n_query + 2 * config.n_kv_head * config.head_dim
        self.qkv = nn.Linear(config.n_embd, self.n_qkv, bias=config.bias)
        self.proj = nn.Linear(self.n_query, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def new_cache(self, batch_size: int, capacity: int, **options: Any) -> LayerCache | None:
        """options: device and dtype."""
        return KVCache(batch_size, self.n_kv_head, capacity, self.head_dim, self.head_dim, **options)

    def costs(self, length: int) -> Costs:
        return Costs(
            weights=linear_weights(self),
            attention_flops=4 * self.n_query * length,
            activations=3 * self.n_qkv + self.n_query,
            attention_scores=self.n_head * length,
        )

    def forward(self, x: Tensor, info: PositionInfo, cache: Any = None) -> Tensor:
        """x [B, T, C] -> [B, T, C]; cache: this layer's, or None"""
        B, T, _ = x.shape
        H, G, D = self.n_head, self.n_kv_head, self.head_dim
        q, k, v = self.qkv(x).view(B, T, H + 2 * G, D).split((H, G, G), dim=2)  # [B, T, heads, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if info.rotary is not None:
            q, k = (apply_rotary_emb(t, *info.rotary).to(v.dtype) for t in (q, k))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, T, D]
        if cache is not None:
            k, v = cache.update(k, v, info)
        y = self.attend(q, k, v, info.mask)
        return self.proj(y.transpose(1, 2).reshape(B, T, H * D))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None
    ) -> Tensor:
        """q [B, H, T, D], k and v [B, G, S, D] -> [B, H, T, D]; mask: see PositionInfo.

        scale: factor on the products of q and k; default: 1 / sqrt(D).
        """
        B, H, T, D = q.shape
        group = H // k.shape[1]
        dropout = self.dropout.p if self.training else 0.0
        causal = self.is_causal and mask is None and T > 1
        if group > 1 and causal:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        elif group > 1:
            # The heads of a group become rows of one query, so that keys and values need not be copied.
            q = q.reshape(B, H // group, group * T, D)
            if mask is not None:
                mask = mask.expand(-1, group, T, -1).flatten(1, 2).unsqueeze(1)
        # On short texts the kernel is faster only if the compiler fuses the steps between its products.
        faster = T >= 256 or torch.compiler.is_compiling()
        if self.custom_kernels and causal and not dropout and self.training and faster and scale is None:
            return kernels.causal_attention(q, k, v)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
        ).reshape(B, H, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, config: Any):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=config.bias)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)

    def costs(self) -> Costs:
        return Costs(weights=linear_weights(self), activations=4 * self.down.in_features)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then an MLP. Another architecture may pass modules of its own for either."""

    def __init__(self, config: Any, attn: nn.Module | None = None, mlp: nn.Module | None = None):
        super().__init__()
        self.attn_norm: nn.Module = RMSNorm(config.n_embd, config.norm_eps)
        self.attn: Any = attn or Attention(config)
        self.mlp_norm: nn.Module = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp: Any = mlp or MLP(config)
        self.dropout = nn.Dropout(0.0)  # see GPT.set_dropout
        self.n_embd = config.n_embd

    def new_cache(self, batch_size: int, capacity: int, **options: Any) -> LayerCache | None:
        """An empty cache for `batch_size` texts of at most `capacity` tokens; None if there is none."""
        return self.attn.new_cache(batch_size, capacity, **options)

    def costs(self, length: int) -> Costs:
        """Costs of one token in a text of `length` tokens. Norms and residual sums keep 6 C numbers."""
        return self.attn.costs(length) + self.mlp.costs() + Costs(activations=6 * self.n_embd)

    def forward(self, x: Tensor, info: PositionInfo, cache: Any = None) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), info, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def embedding(number: int, size: int) -> nn.Embedding:
    """An nn.Embedding. On the "meta" device, where it has no memory, it skips the random initialization,
    which would load torch's compiler."""
    if (weight := torch.empty(number, size)).is_meta:
        return nn.Embedding.from_pretrained(weight, freeze=False)
    return nn.Embedding(number, size)


class GPT(nn.Module):
    """The whole network. `config`: a `ModelConfig` whose vocab_size is set; ValueError if it is not.

    Another architecture is a subclass that overrides some of the methods of the first section below.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor
    custom_kernels = False  # see use_custom_kernels
    logit_softcap: float | None = None  # logits become cap * tanh(logits / cap) (Gemma Team 2024, section 2)

    def __init__(self, config: Any):
        super().__init__()
        if not config.vocab_size:
            raise ValueError("vocab_size is not set: config.resolved(tokenizer.vocab_size) does it")
        self.config: Any = config.resolved(config.vocab_size)
        self.make_modules()
        if self.config.use_rope:
            cos, sin = self.rotary_tables()
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        if not self.wte.weight.is_meta:
            self.init_weights()
        # Tied weights count once. Counted here, because ZeRO-3 later empties the tensors.
        self.n_params = sum(p.numel() for p in self.parameters())
        self.n_matrix_params = sum(p.numel() for p in self.matrices())

    # -- what an architecture may override ---------------------------------------------------------------

    def make_modules(self) -> None:
        """Create all layers."""
        c = self.config
        self.wte = embedding(c.vocab_size, c.n_embd)
        self.wpe = None if c.use_rope else embedding(c.block_size, c.n_embd)
        self.dropout = nn.Dropout(0.0)
        self.blocks: Any = nn.ModuleList(self.make_block(layer) for layer in range(c.n_layer))
        self.norm: nn.Module = RMSNorm(c.n_embd, c.norm_eps)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.lm_head.weight = self.wte.weight

    def make_block(self, layer: int) -> nn.Module:
        """The block of this layer; blocks may differ. It has `new_cache`, `costs` and `forward` as Block."""
        return Block(self.config)

    def init_weights(self) -> None:
        """Set the initial weights."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            # 2 n_layer sublayers add to the stream: scale them down so that its variance at the start does
            # not grow with the depth (Radford et al. 2019, GPT-2, section 2.3).
            for linear in (block.attn.proj, block.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def rotary_tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin for all positions, [block_size, D / 2] each."""
        c = self.config
        return self.make_rotary_tables(c.head_dim, attention_factor(c.rope_scaling))

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B, T], positions [1 or B, T] -> the input of the first block [B, T, C]"""
        x = self.wte(tokens)
        return x if self.wpe is None else x + self.wpe(positions)

    def logits(self, x: Tensor) -> Tensor:
        """final vectors [..., C] -> scores of the next token [..., V]"""
        logits = self.lm_head(x)
        if self.logit_softcap:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits

    def auxiliary_loss(
        self, x: Tensor, targets: Tensor, mask: Tensor
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Further losses of this architecture: (their sum over the batch, or None; metrics to log).

        An objective adds the sum to its own loss in training. x [B, T, C] are the final vectors, targets and
        mask [B, T]. metrics: {name: scalar tensor}; training logs each one's mean over the forward passes of
        a step. A name such as "expert_load/2" is a curve of layer 2.
        """
        return None, {}

    def after_step(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Called after each step of the optimizer. all_reduce(tensor) sums it over all processes."""

    def drafter(self) -> Callable[[Tensor, Tensor], list[int]] | None:
        """None, or a function that guesses the next tokens, for speculative decoding. It is called after
        each pass with the final vectors [1, T, C] of the tokens just read and the tokens that follow them
        [1, T], and returns a list of ids."""
        return None

    def costs(self, length: int, training: bool) -> Costs:
        """Costs of one token in a text of `length` tokens: all blocks and the output head."""
        blocks = (block.costs(length) for block in self.blocks)
        return sum(blocks, Costs(weights=linear_weights(self.lm_head)))

    # -- the same for all architectures ------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def make_rotary_tables(self, size: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """`rotary_table` for heads of which `size` numbers are rotated, times `factor`."""
        c, weight = self.config, self.wte.weight
        if weight.is_meta:
            return tuple(torch.empty(2, c.block_size, size // 2, device="meta"))  # type: ignore[return-value]
        cos, sin = rotary_table(size, c.block_size, c.rope_theta, c.rope_scaling)
        return (cos * factor).to(weight.device), (sin * factor).to(weight.device)

    def matrices(self) -> list[nn.Parameter]:
        """Muon's part: the blocks' matrices [outputs, inputs] and stacks of them [E, inputs, outputs]."""
        return [p for p in self.blocks.parameters() if p.dim() >= 2]

    def forward(self, tokens: Tensor, cache: Cache | None = None, lengths: Tensor | None = None) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]; see `hidden`"""
        return self.logits(self.hidden(tokens, cache, lengths))

    def hidden(self, tokens: Tensor, cache: Cache | None = None, lengths: Tensor | None = None) -> Tensor:
        """tokens [B, T] -> the final vectors [B, T, C], which the output head reads

        With a cache, the tokens continue what the cache holds. lengths [B]: how many of the T tokens of each
        row are real, where that differs (padding on the right is ignored).
        Raises ValueError if the tokens do not fit into block_size or the cache, and for a cache with
        is_causal = false, where a later token would change all earlier ones.
        """
        info = self.position_info(tokens, cache, lengths)
        x = self.dropout(self.embed(tokens, info.positions))
        for number, block in enumerate(self.blocks):
            x = block(x, info, cache and cache.layers[number])
        if cache is not None:
            cache.advance(tokens.shape[1] if lengths is None else lengths)
        return self.norm(x)

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """final vectors x [N, C], the tokens that followed [N] -> negative log-likelihoods in nats [N]"""
        # The kernel implements a plain linear head: no other class, no bias, no overridden `logits`.
        is_usual = type(self.lm_head) is nn.Linear and self.lm_head.bias is None
        if self.custom_kernels and is_usual and type(self).logits is GPT.logits:
            return kernels.linear_cross_entropy(x, self.lm_head.weight, targets, self.logit_softcap)
        return F.cross_entropy(self.logits(x).float(), targets, reduction="none")

    def new_cache(self, batch_size: int = 1, capacity: int | None = None) -> Cache:
        """An empty cache for so many texts of at most `capacity` (default: block_size) tokens."""
        capacity = capacity or self.config.block_size
        options = {"device": self.device, "dtype": self.dtype}
        layers = [block.new_cache(batch_size, capacity, **options) for block in self.blocks]
        return Cache(layers, batch_size, capacity)

    def position_info(
        self, tokens: Tensor, cache: Cache | None = None, lengths: Tensor | None = None
    ) -> PositionInfo:
        positions, mask = self.positions_and_mask(tokens, cache, lengths)
        rotary = None
        if self.config.use_rope:
            rotary = self.rotary_cos[positions].unsqueeze(2), self.rotary_sin[positions].unsqueeze(2)
        past = 0 if cache is None else cache.uniform_length
        return PositionInfo(positions, mask, rotary, past, lengths)

    def positions_and_mask(
        self, tokens: Tensor, cache: Cache | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See PositionInfo."""
        T, config = tokens.shape[1], self.config
        if cache is not None and not config.is_causal:
            raise ValueError("only a causal model can continue from a cache, and is_causal is false")
        room = config.block_size if cache is None else min(cache.capacity, config.block_size)
        past = 0 if cache is None else int(cache.lengths.max())
        if past + T > room:
            raise ValueError(f"{past} + {T} tokens do not fit in a context of {room}")
        if cache is None or cache.uniform_length is not None:
            positions = torch.arange(past, past + T, device=tokens.device)[None]
            if past and T > 1:
                mask = positions[0, :, None] >= torch.arange(past + T, device=tokens.device)  # [T, S]
                return positions, mask[None, None]
            if lengths is not None and not config.is_causal:
                return positions, (positions < lengths[:, None])[:, None, None]  # [B, 1, 1, S]
            return positions, None
        positions = torch.from_numpy(cache.lengths[:, None] + np.arange(T)).to(tokens.device)
        slots = torch.arange(cache.capacity, device=tokens.device)
        return positions, (positions[:, :, None] >= slots)[:, None]  # [B, 1, T, S]

    def set_dropout(self, p: float) -> "GPT":
        """Dropout in training: of the embeddings, the attention weights, and what each block adds."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
        return self

    def use_custom_kernels(self, on: bool) -> None:
        """Train with the attention and loss of common/kernels.py (only in float32 on a CPU)."""
        modules: Any = self.modules()
        for module in modules:
            if hasattr(module, "custom_kernels"):
                module.custom_kernels = on

    def flops_per_token(self, length: int | None = None, training: bool = True) -> int:
        """Floating-point operations per token, counted from the shapes.

        2 per weight of each matrix product and, for attention over `length` tokens (default: block_size),
        4 * length per query dimension: the full square, as in PaLM (Chowdhery et al. 2022, appendix B) and
        nanoGPT, although a causal kernel may skip half of it. The backward pass costs twice the forward pass.
        """
        costs = self.costs(length or self.config.block_size, training)
        forward = 2 * costs.weights + costs.attention_flops
        return 3 * forward if training else forward

    @torch.inference_mode()
    def transduce(self, tokens: Tensor) -> Tensor:
        """Sequence to sequence in one pass, for is_causal = false: tokens [B, T] -> best output [B, T]."""
        return self.logits(self.hidden(tokens)).argmax(-1)
