"""The Nano transformer, from its building blocks up.

A decoder in the manner of Llama and Qwen3: each block adds attention, then an MLP, to the
stream of token vectors, and each of the two reads the stream through an RMSNorm.

    tokens [B, T] -> embedding [B, T, C] -> n_layer x Block -> RMSNorm -> logits [B, T, V]

Worth knowing before reading:
- Positions are rotary (RoPE) unless `use_rope` is false, then they are learned.
- `n_kv_head` < `n_head` is grouped-query attention: heads share keys and values, and the KV
  cache holds only `n_kv_head` of them.
- One matrix makes queries, keys and values, and one makes both halves of the gated MLP:
  a few large products are faster than many small ones.
- Attention and loss have a faster version for training on a CPU in `common/kernels.py`:
  `use_custom_kernels`. Everything else here is PyTorch's operations.
- Other architectures are subclasses of `GPT` in `models/`, which change some of its parts.

Shapes: B rows, T tokens, C = n_embd, H = n_head, G = n_kv_head, D = head_dim, V = vocab_size.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import kernels
from config.schema import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotary_table(head_dim, length, theta, scaling=None):
    """cos and sin of position x frequency, each [length, head_dim / 2], float32.

    Su et al. 2021, "RoFormer", section 3.4.2: pair i turns by position * theta^(-2i / D).
    scaling: the configuration's rope_scaling.
    """
    # On the CPU, whatever the device of the model: so they are the same on all.
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = theta ** -(pairs / head_dim)
    if scaling:
        frequencies = stretched(frequencies, theta, scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), frequencies)
    return angles.cos(), angles.sin()


def stretched(frequencies, theta, scaling):
    """Frequencies [D / 2] for a context `factor` times longer than that of the pretraining.

    Pairs that turn often in the original context are kept, those that hardly turn are slowed down by
    `factor`, and between the two lies a ramp: linear in the number of turns for Llama 3.1, in the
    number of the pair for YaRN (Peng et al. 2023, "YaRN", section 3.2).
    """
    context = scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = (context * frequencies / (2 * math.pi) - low) / (high - low)
    else:

        def pair_with(turns):
            return len(frequencies) * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

        first = max(math.floor(pair_with(scaling.beta_fast)), 0)
        last = min(math.ceil(pair_with(scaling.beta_slow)), 2 * len(frequencies) - 1)
        keep = 1 - (torch.arange(len(frequencies), device="cpu") - first) / max(last - first, 0.001)
    keep = keep.clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)


def attention_factor(scaling):
    """What queries and keys are multiplied with for a longer context (YaRN, section 3.4, equation 22)."""
    return 0.1 * math.log(scaling.factor) + 1 if scaling and scaling.rope_type == "yarn" else 1.0


def apply_rotary_emb(x, cos, sin):
    """Turn the pairs (i, i + D/2) of x [B, T, heads, D] by angles [..., T, 1, D/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class KVCache:
    """Keys and values of the tokens already seen, so that a new token costs one position.

    `keys[l]`, `values[l]`: [B, heads, capacity, size of a key or a value] of layer l. `lengths` [B], on the
    host, counts the tokens each row holds: rows of a batch may differ, and what lies behind a row's length is
    never looked at.
    """

    def __init__(self, n_layer, batch_size, heads, capacity, key_size, value_size, device=None, dtype=None):
        shape = (n_layer, batch_size, heads, capacity)
        self.keys = torch.zeros(*shape, key_size, device=device, dtype=dtype)
        self.values = torch.zeros(*shape, value_size, device=device, dtype=dtype)
        self.lengths = np.zeros(batch_size, np.int64)

    @property
    def capacity(self):
        return self.keys.shape[3]

    @property
    def uniform_length(self):
        """The length of all rows; None where they differ."""
        first, *others = self.lengths.tolist()
        return first if others.count(first) == len(others) else None

    def rows(self, first, last, capacity=None):
        """Rows first .. last - 1, and at most `capacity` places of them: a cache that shares their memory."""
        part = copy.copy(self)
        part.keys = self.keys[:, first:last, :, :capacity]
        part.values = self.values[:, first:last, :, :capacity]
        part.lengths = self.lengths[first:last]
        return part

    def copy_row(self, source, target):
        length = self.lengths[target] = self.lengths[source]
        for tensor in (self.keys, self.values):
            tensor[:, target, :, :length] = tensor[:, source, :, :length]

    def update(self, layer, positions, k, v):
        """Store k, v [B, heads, T, size] at positions [B, T]; returns all of this layer up to the last."""
        keys, values, length = self.keys[layer], self.values[layer], self.uniform_length
        if length is not None:
            end = length + k.shape[2]
            keys[:, :, length:end] = k
            values[:, :, length:end] = v
            return keys[:, :, :end], values[:, :, :end]
        index = positions[:, None, :, None]
        keys.scatter_(2, index.expand_as(k), k.to(keys.dtype))
        values.scatter_(2, index.expand_as(v), v.to(values.dtype))
        return keys, values

    def advance(self, counts):
        """The rows have grown by `counts`, or shrunk: an int, or a tensor [B] where they differ."""
        self.lengths += counts if isinstance(counts, int) else counts.cpu().numpy()


class Attention(nn.Module):
    """Multi-head self-attention with grouped keys and values (Ainslie et al. 2023)."""

    custom_kernels = False  # see GPT.use_custom_kernels

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.is_causal, self.dropout = config.is_causal, config.dropout
        self.make_projections(config)

    def make_projections(self, config):
        """From x to queries, keys and values, and from the heads back; another attention has others."""
        self.n_kv_head, self.head_dim = config.n_kv_head, config.head_dim
        n_query = config.n_head * config.head_dim
        n_qkv = n_query + 2 * config.n_kv_head * config.head_dim
        self.qkv = nn.Linear(config.n_embd, n_qkv, bias=config.bias)
        self.proj = nn.Linear(n_query, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.cache_sizes = config.n_kv_head, config.head_dim, config.head_dim  # see GPT.new_cache
        self.flops_per_key, self.activations = 4 * n_query, 3 * n_qkv + n_query  # see GPT.flops_per_token

    def forward(self, x, rotary, cache, positions, mask):
        B, T, _ = x.shape
        H, G, D = self.n_head, self.n_kv_head, self.head_dim
        q, k, v = self.qkv(x).view(B, T, H + 2 * G, D).split((H, G, G), dim=2)  # [B, T, heads, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = apply_rotary_emb(q, *rotary).to(v.dtype), apply_rotary_emb(k, *rotary).to(v.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, T, D]
        if cache is not None:
            k, v = cache.update(self.layer, positions, k, v)
        y = self.attend(q, k, v, mask)
        return self.proj(y.transpose(1, 2).reshape(B, T, H * D))

    def attend(self, q, k, v, mask, scale=None):
        """q [B, H, T, D], k and v [B, G, S, D] -> [B, H, T, D]; mask: [B or 1, 1, T or 1, S] or None.

        scale: of the products of q and k, 1 / sqrt(D) if None.
        """
        B, H, T, D = q.shape
        group = H // k.shape[1]
        dropout = self.dropout if self.training else 0.0
        causal = self.is_causal and mask is None and T > 1
        if group > 1 and causal:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        elif group > 1:
            # The heads of a group become rows of one query: keys and values are not copied.
            q = q.reshape(B, H // group, group * T, D)
            if mask is not None:
                mask = mask.expand(-1, group, T, -1).flatten(1, 2).unsqueeze(1)
        # A short text pays only where the compiler fuses what lies between the products.
        pays = T >= 256 or torch.compiler.is_compiling()
        if self.custom_kernels and causal and not dropout and self.training and pays and scale is None:
            return kernels.causal_attention(q, k, v)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
        ).reshape(B, H, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=config.bias)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.activations = 4 * config.n_hidden  # see GPT.flops_per_token

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """attn, mlp: what another architecture has in their places."""

    def __init__(self, config, layer, attn=None, mlp=None):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = attn or Attention(config, layer)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = mlp or MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.activations = 6 * config.n_embd  # see GPT.flops_per_token

    def forward(self, x, rotary, cache, positions, mask):
        x = x + self.dropout(self.attn(self.attn_norm(x), rotary, cache, positions, mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def embedding(number, size):
    """nn.Embedding, but without memory (device "meta") it draws no numbers: to do so loads a compiler."""
    weight = torch.empty(number, size)
    return (
        nn.Embedding.from_pretrained(weight, freeze=False) if weight.is_meta else nn.Embedding(number, size)
    )


class GPT(nn.Module):
    """The whole network. `config`: a `ModelConfig` whose vocab_size is set.

    Another architecture is a subclass that has other `make_block` and `make_norm`, or changes `embed`,
    `logits`, or more; everything else (loss, cache, decoding, training) is here.
    """

    custom_kernels = False  # see use_custom_kernels

    def __init__(self, config: ModelConfig):
        super().__init__()
        if not config.vocab_size:
            raise ValueError("vocab_size is not set: config.resolved(tokenizer.vocab_size) does it")
        self.config = config = config.resolved(config.vocab_size)
        self.wte = embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.use_rope else embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(self.make_block(layer) for layer in range(config.n_layer))
        self.norm = self.make_norm()
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        if config.use_rope:
            cos, sin = self.rotary_tables()
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        self.make_rest()
        if not self.wte.weight.is_meta:
            self.init_weights()
        # Trainable numbers; a tied matrix counts once. Counted now: ZeRO-3 takes the weights away.
        self.n_params = sum(p.numel() for p in self.parameters())
        self.n_matrix_params = sum(p.numel() for p in self.matrices())

    # -- parts that an architecture may have otherwise ---------------------------------------------------

    def make_block(self, layer):
        return Block(self.config, layer)

    def make_rest(self):
        """Further modules, beside the blocks."""

    def make_norm(self):
        return RMSNorm(self.config.n_embd, self.config.norm_eps)

    @property
    def rotary_size(self):
        """How many numbers of a head are turned."""
        return self.config.head_dim

    @property
    def rotary_factor(self):
        """What they are multiplied with as they are turned."""
        return attention_factor(self.config.rope_scaling)

    def rotary_tables(self):
        """See `rotary_table`. A model without memory (device "meta") has tables without memory."""
        c, weight = self.config, self.wte.weight
        if weight.is_meta:
            return torch.empty(2, c.block_size, self.rotary_size // 2, device="meta")
        table = rotary_table(self.rotary_size, c.block_size, c.rope_theta, c.rope_scaling)
        return [(values * self.rotary_factor).to(weight.device) for values in table]

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            # 2 n_layer sublayers add to the stream; keep its variance at the start near that of one
            # (Radford et al. 2019, GPT-2, section 2.3).
            for linear in (block.attn.proj, block.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def matrices(self):
        """The blocks' matrices [outputs, inputs] and stacks of them [E, inputs, outputs], for Muon."""
        return [p for p in self.blocks.parameters() if p.dim() >= 2]

    def parts(self, training):
        """The modules that a token passes through, each as often as it does; in training maybe more."""
        return [*self.children()]

    def embed(self, tokens, positions):
        """tokens [B, T], positions [1 or B, T] -> the vectors [B, T, C] with which the first block begins."""
        x = self.wte(tokens)
        return x if self.wpe is None else x + self.wpe(positions)

    def logits(self, x):
        """final vectors [..., C] -> scores of the next token [..., V]"""
        return self.lm_head(x)

    def total_loss(self, x, targets, weights):
        """x [N, C], targets, weights [N] -> (logits [N, V], weighted sum of the cross-entropies in nats)."""
        if self.has_kernel(GPT.logits):
            return kernels.linear_cross_entropy(x, self.lm_head.weight, targets, weights)
        logits = self.logits(x)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return logits, (losses * weights).sum()

    def new_cache(self, batch_size=1, capacity=None, n_layer=None):
        """n_layer: how many layers it is for; default: all blocks."""
        c = self.config
        heads, *sizes = self.blocks[0].attn.cache_sizes  # and the sizes of a key and a value
        shape = n_layer or c.n_layer, batch_size, heads, capacity or c.block_size, *sizes
        return KVCache(*shape, device=self.device, dtype=self.dtype)

    def drafter(self):
        """None, or a function that guesses how a text goes on, for `generate`, called after each pass:
        (final vectors [1, T, C] of the tokens read, the tokens that follow them [1, T]) -> list of ids."""

    def training_loss(self, loss, x, targets, loss_mask, loss_divisor):
        """(the same number, its gradient being that of all that is to become small; other_vars)

        Only in training; loss_mask and loss_divisor as in `forward`, x [B, T, C]: the final vectors.
        """
        return loss, {}

    def after_step(self, sum_over_processes):
        """Called after each step of the optimizer. sum_over_processes(*numbers) -> list of floats."""

    # -- what all architectures do alike -------------------------------------------------------------------

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def forward(self, tokens, targets=None, loss_mask=None, loss_divisor=None, cache=None, lengths=None):
        """tokens [B, T] -> (logits [B, T, V], loss, other_vars).

        targets [B, T] gives the loss: the cross-entropy in nats of each position, weighted by
        loss_mask [B, T] (default: all ones), summed, and divided by loss_divisor (default: the
        sum of loss_mask). A step that is cut into several passes gives each of them the divisor
        of the whole, so that their losses, and gradients, add up to those of the whole batch.

        other_vars: {name: scalar tensor} of what is worth watching; training logs each one's mean over the
        passes of a step. Names of one curve a layer end in "/" and the layer's number.

        cache, lengths: see `hidden`.
        """
        x = self.hidden(tokens, cache, lengths)
        if targets is None:
            return self.logits(x), None, {}
        if loss_mask is None:
            loss_mask = torch.ones_like(targets, dtype=torch.float32)
        if loss_divisor is None:
            loss_divisor = loss_mask.sum()
        logits, total = self.total_loss(x.flatten(0, 1), targets.flatten(), loss_mask.flatten())
        loss, other_vars = total / loss_divisor, {}
        if self.training:
            loss, other_vars = self.training_loss(loss, x, targets, loss_mask, loss_divisor)
        return logits.unflatten(0, tokens.shape), loss, other_vars

    def hidden(self, tokens, cache=None, lengths=None, through=None):
        """tokens [B, T] -> the final vectors [B, T, C], before the output head.

        through: what the embedded tokens pass through, in place of `through_blocks`.

        With a cache the tokens continue what the cache holds. lengths [B] says how many of the T
        tokens of each row are real, where that differs (padding on the right is ignored).
        Raises ValueError when more than block_size tokens, or than the cache holds, would be needed,
        and for a cache with is_causal = false: there, a later token changes all earlier ones.
        """
        positions, mask = self.positions_and_mask(tokens, cache, lengths)
        x = self.dropout(self.embed(tokens, positions))
        x = (through or self.through_blocks)(x, self.rotary_at(positions), cache, positions, mask)
        if cache is not None:
            cache.advance(tokens.shape[1] if lengths is None else lengths)
        return x

    def through_blocks(self, x, *place):
        """place: what `Block.forward` takes beside the vectors x [B, T, C]."""
        for block in self.blocks:
            x = block(x, *place)
        return self.norm(x)

    def positions_and_mask(self, tokens, cache, lengths):
        """Positions [1 or B, T] of the tokens, and who sees whom, [1 or B, 1, 1 or T, S]; None: as usual."""
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

    def rotary_at(self, positions):
        """cos and sin at positions [1 or B, T], each [1 or B, T, 1, rotary_size / 2]; None without RoPE."""
        if not self.config.use_rope:
            return None
        return self.rotary_cos[positions].unsqueeze(2), self.rotary_sin[positions].unsqueeze(2)

    def use_custom_kernels(self, on):
        """Train with attention and loss of `common.kernels` (float32 on a CPU only), or with PyTorch's."""
        for module in self.modules():
            if hasattr(module, "custom_kernels"):
                module.custom_kernels = on

    def has_kernel(self, logits):
        """Whether `kernels.linear_cross_entropy` is to be used, and right: for these logits of a class."""
        is_plain = type(self.lm_head) is nn.Linear and self.lm_head.bias is None
        return self.custom_kernels and is_plain and type(self).logits is logits

    def flops_per_token(self, length=None, training=True):
        """Floating-point operations per token, counted from the shapes.

        2 per weight of each matrix product and, for attention over `length` tokens (default:
        block_size), 4 * length per query dimension: the full square, as PaLM (Chowdhery et al.
        2022, appendix B) and nanoGPT count it, though a causal kernel may skip half of it.
        The backward pass costs twice the forward pass.

        Linear layers are counted as they are. Other modules say themselves what a token meets in them:
        `active_weights` of further matrices, `flops_per_key` of attention, `activations` that are kept.
        """
        weights = self.counted("active_weights", training)
        forward = 2 * weights + (length or self.config.block_size) * self.counted("flops_per_key", training)
        return 3 * forward if training else forward

    @property
    def active_weights(self):
        """How many weights of matrices a token is multiplied with when text is written."""
        return self.counted("active_weights", training=False)

    def activations_per_token(self, keeps_attention):
        """About how many numbers the blocks keep of a token for the backward pass, counted from the shapes.

        keeps_attention: whether the attention weights are among them.
        """
        rows = self.counted("n_head", training=True) if keeps_attention else 0
        return self.counted("activations", training=True) + rows * self.config.block_size

    def counted(self, name, training):
        """The sum of all numbers of this name in modules that a token passes through."""
        modules = [module for part in self.parts(training) for module in part.modules()]
        counted = sum(getattr(module, name, 0) for module in modules)
        if name == "active_weights":
            counted += sum(m.in_features * m.out_features for m in modules if isinstance(m, nn.Linear))
        return counted

    @torch.inference_mode()
    def transduce(self, tokens):
        """Sequence to sequence in one pass, for is_causal = false: tokens [B, T] -> best output [B, T]."""
        return self.logits(self.hidden(tokens)).argmax(-1)
