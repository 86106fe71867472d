"""DeepSeek-V3 (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report"), small enough for a desk.

Three parts differ from model.py's network:

- Multi-head latent attention (section 2.1.1): keys and values of all heads are made from one short vector
  per token, the latent. It is all that the KV cache holds, with one rotary key that the heads share.
- Mixture of experts (section 2.1.2): a token passes through the shared experts and those
  `num_experts_per_tok` of many small routed ones that its scores choose. A bias on the choice, moved after
  each step, keeps the experts equally busy; no token is ever dropped.
- Multi-token prediction (section 2.2): one more block predicts the token after the next one. In training it
  is a second loss, in greedy decoding it drafts tokens that the network then accepts or corrects.

Weights beside the released ones: `q_a`, `q_norm`, `q_b` (or `q`), `kv_a`, `kv_norm`, `kv_b` and `proj` are
q_a_proj, q_a_layernorm, q_b_proj (q_proj), kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj and o_proj. Rotary
rows (the last qk_rope_head_dim of each head in q_b or q, and of kv_a) stand there as pairs 0 1, 2 3, ...,
and here as all first halves, then all second halves. An expert's matrices are transposed here,
[E, in, out], gate beside up. `mtp.norm` is the released shared_head.norm.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from common import kernels
from config.schema import ArchitectureConfig
from model import (
    GPT,
    MLP,
    Attention,
    Block,
    Cache,
    Costs,
    KVCache,
    RMSNorm,
    apply_rotary_emb,
    attention_factor,
    linear_weights,
)

LATENT_EPS = 1e-6  # of the norms of the latents, whatever norm_eps is
Size = Annotated[int, Field(ge=1, le=1 << 16)]


class Config(ArchitectureConfig):
    """config/model_config.json for this architecture; the names are those of DeepSeek's own config.json."""

    is_causal: ClassVar[bool] = True
    use_rope: ClassVar[bool] = True
    bias: ClassVar[bool] = False

    # fmt: off
    architecture: Literal["deepseek_v3"] = Field(description="which model to build")
    norm_eps: float = Field(1e-6, gt=0, lt=1, description="added to the mean square in RMSNorm")
    tie_embeddings: bool = Field(False, description="the output head shares the embedding's matrix")
    q_lora_rank: Size | None = Field(None, description="size of the queries' latent; null: they have none")
    kv_lora_rank: Size = Field(64, description="size of the latent of keys and values")
    qk_nope_head_dim: Size = Field(32, description="part of a head's key without position")
    qk_rope_head_dim: Size = Field(32, description="part of it that is turned, one for all heads; even")
    v_head_dim: Size = Field(64, description="size of a head's value; fastest if a head's key is as large")
    n_routed_experts: Size = Field(16, description="experts of a layer to choose from")
    n_shared_experts: int = Field(1, ge=0, le=1024, description="experts that every token passes through")
    num_experts_per_tok: Size = Field(4, description="routed experts that a token chooses")
    n_group: Size = Field(4, description="groups of routed experts")
    topk_group: Size = Field(2, description="groups from which a token may choose")
    moe_intermediate_size: Size = Field(128, description="width inside an expert")
    first_k_dense_replace: int = Field(1, ge=0, le=1024, description="first layers, with a dense MLP instead")
    routed_scaling_factor: float = Field(
        2.0, gt=0, le=1000, description="of the experts' weighted sum; about sqrt(num_experts_per_tok)")
    norm_topk_prob: bool = Field(True, description="the weights of a token's experts sum to one")
    num_nextn_predict_layers: int = Field(1, ge=0, le=1, description="1: predict the token after next, too")
    bias_update_speed: float = Field(
        0.01, ge=0, le=1, description="how far a step moves the bias that balances the experts; "
        "DeepSeek's 0.001 is for far longer runs; 0: off")
    aux_loss_alpha: float = Field(1e-4, ge=0, le=10, description="weight of the balance loss of a sequence")
    mtp_loss_weight: float = Field(0.3, ge=0, le=10, description="weight of the loss of the token after next")
    # fmt: on

    @model_validator(mode="after")
    def _shapes_fit(self):
        c, group = self, self.n_routed_experts // self.n_group
        key = c.qk_nope_head_dim + c.qk_rope_head_dim
        if c.n_routed_experts % c.n_group:
            raise ValueError(
                f"n_routed_experts={c.n_routed_experts} does not divide into n_group={c.n_group} groups"
            )
        if c.qk_rope_head_dim % 2:
            raise ValueError(f"rotary positions need an even qk_rope_head_dim, found {c.qk_rope_head_dim}")
        for name, most, limit in (
            ("topk_group", c.n_group, f"there are groups, n_group={c.n_group}"),
            ("num_experts_per_tok", c.topk_group * group,
             f"topk_group={c.topk_group} groups of {group} experts hold"),
            ("first_k_dense_replace", c.n_layer, f"n_layer={c.n_layer}"),
            ("v_head_dim", key, f"qk_nope_head_dim + qk_rope_head_dim = {key}"),
        ):  # fmt: skip
            if getattr(c, name) > most:
                raise ValueError(f"{name}={getattr(c, name)} is more than {limit}")
        return self


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, section 2.1). H heads, latents of size R."""

    def make_projections(self, config):
        c = self.config = config
        self.sizes = c.qk_nope_head_dim, c.qk_rope_head_dim
        self.gain = attention_factor(c.rope_scaling) ** 2
        n_query = c.n_head * sum(self.sizes)
        if c.q_lora_rank:
            self.q_a = nn.Linear(c.n_embd, c.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(c.q_lora_rank, LATENT_EPS)
            self.q_b = nn.Linear(c.q_lora_rank, n_query, bias=False)
        else:
            self.q = nn.Linear(c.n_embd, n_query, bias=False)
        self.kv_a = nn.Linear(c.n_embd, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(c.kv_lora_rank, LATENT_EPS)
        self.kv_b = nn.Linear(c.kv_lora_rank, c.n_head * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.proj = nn.Linear(c.n_head * c.v_head_dim, c.n_embd, bias=False)

    def new_cache(self, batch_size, capacity, **options):
        return KVCache(batch_size, 1, capacity, self.config.kv_lora_rank + self.sizes[1], 0, **options)

    def costs(self, length):
        c = self.config
        per_head = 6 * c.qk_nope_head_dim + 5 * c.qk_rope_head_dim + c.v_head_dim
        return Costs(
            weights=linear_weights(self),
            attention_flops=2 * c.n_head * (sum(self.sizes) + c.v_head_dim) * length,
            activations=c.n_head * per_head + 2 * (c.q_lora_rank or 0) + 3 * c.kv_lora_rank,
            attention_scores=c.n_head * length,
        )

    def forward(self, x, info, cache=None):
        B, T, _ = x.shape
        c = self.config
        q = self.q_b(self.q_norm(self.q_a(x))) if c.q_lora_rank else self.q(x)
        q = q if self.gain == 1 else q * self.gain
        q_nope, q_rope = q.view(B, T, c.n_head, -1).split(self.sizes, dim=-1)
        q_rope = apply_rotary_emb(q_rope, *info.rotary).to(q.dtype)
        latent, k_rope = self.kv_a(x).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        latent, k_rope = self.kv_norm(latent), apply_rotary_emb(k_rope.unsqueeze(2), *info.rotary).to(q.dtype)
        kept = None
        if cache is not None:
            new = torch.cat((latent, k_rope.squeeze(2)), dim=-1).unsqueeze(1)
            kept, _ = cache.update(new, new[..., :0], info)  # [B, 1, S, R + rope]
        if kept is None or kept.shape[2] == T:
            y = self.attend_expanded(q_nope, q_rope, latent, k_rope, info.mask)
        else:
            y = self.attend_latents(q_nope, q_rope, kept, info.mask)
        return self.proj(y.reshape(B, T, -1))

    def attend_expanded(self, q_nope, q_rope, latent, k_rope, mask):
        """Tokens among themselves, every head with keys and values of its own; -> [B, T, H, v_head_dim]."""
        c = self.config
        k, v = self.kv_b(latent).unflatten(-1, (c.n_head, -1)).split((self.sizes[0], c.v_head_dim), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k, k_rope.expand_as(q_rope)), dim=-1)
        v = F.pad(v, (0, sum(self.sizes) - c.v_head_dim))  # not all kernels take values of another size
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return y.transpose(1, 2)[..., : c.v_head_dim]

    def attend_latents(self, q_nope, q_rope, kept, mask):
        """A few tokens after a past, of which `kept` [B, 1, S, R + rope] is there; -> [B, T, H, v_head_dim].

        kv_b is applied to the queries instead of the keys, and to the sum instead of the values, so a past
        token costs no product (DeepSeek-V2, section 2.1.2). All heads look at the same vectors.
        """
        c = self.config
        weight = self.kv_b.weight.view(c.n_head, -1, c.kv_lora_rank)
        to_key, to_value = weight.split((self.sizes[0], c.v_head_dim), dim=1)
        q = torch.cat((torch.einsum("bthd,hdr->bhtr", q_nope, to_key), q_rope.transpose(1, 2)), dim=-1)
        y = self.attend(q, kept, kept, mask, scale=1 / math.sqrt(sum(self.sizes)))[..., : c.kv_lora_rank]
        return torch.einsum("bhtr,hdr->bthd", y, to_value)


class Router(nn.Linear):
    """Which experts a token chooses. In float32, whatever the rest is in."""

    def __init__(self, config):
        super().__init__(config.n_embd, config.n_routed_experts, bias=False)
        self.config = config
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def _apply(self, fn, *args):
        bias = self.e_score_correction_bias
        super()._apply(fn, *args)
        # A change of its type would lose the small steps by which it moves.
        self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x):
        """x [B, T, C] -> scores [B, T, E] between 0 and 1, experts chosen [B, T, K]"""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        if c.topk_group < c.n_group:
            groups = choice.unflatten(-1, (c.n_group, -1))
            best = groups.topk(min(2, groups.shape[-1])).values.sum(-1).topk(c.topk_group).indices
            others = torch.ones_like(groups[..., :1], dtype=torch.bool).scatter(-2, best.unsqueeze(-1), False)
            choice = groups.masked_fill(others, -math.inf).flatten(-2)
        return scores, choice.topk(c.num_experts_per_tok).indices


class Experts(nn.Module):
    """The MLPs of all routed experts, [E, in, out] each."""

    def __init__(self, config):
        super().__init__()
        E, C, M = config.n_routed_experts, config.n_embd, config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(E, C, 2 * M))
        self.down = nn.Parameter(torch.empty(E, M, C))
        self.n_chosen = config.num_experts_per_tok

    def costs(self):
        E, C, M = self.down.shape[0], self.down.shape[2], self.down.shape[1]
        return Costs(weights=self.n_chosen * 3 * C * M, activations=self.n_chosen * (4 * M + 3 * C) + 6 * E)

    @torch.compiler.disable  # how many tokens an expert gets is not known before
    def forward(self, x, chosen, weights):
        """x [N, C], its experts and their weights [N, K] -> weighted sum of what they make of it [N, C]"""
        N, K = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # [N * K] pairs of token and expert, expert by expert
        sizes = chosen.flatten().bincount(minlength=len(self.gate_up))
        # Not x[order // K], whose gradient is a sum that several threads make in any order.
        rows = x.unsqueeze(1).expand(-1, K, -1).flatten(0, 1)[order]
        gate, up = kernels.grouped_matmul(rows, self.gate_up, sizes).chunk(2, dim=-1)
        y = kernels.grouped_matmul(F.silu(gate) * up, self.down, sizes)
        y = torch.empty_like(y).index_copy(0, order, y).view(N, K, -1)
        return (y * weights.unsqueeze(-1).to(y.dtype)).sum(1)


class MoE(nn.Module):
    """Shared experts, which are one MLP, plus the routed ones that a token chooses (equations 12 to 16)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate, self.experts = Router(config), Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared = MLP(config.model_copy(update={"n_hidden": shared})) if shared else None

    def costs(self):
        costs = Costs(weights=linear_weights(self.gate)) + self.experts.costs()
        return costs + self.shared.costs() if self.shared else costs

    def forward(self, x):
        scores, chosen = self.gate(x)
        weights = scores.gather(-1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.config.routed_scaling_factor
        self.routing = (scores, chosen) if self.training else None  # for `Model.balance`
        y = self.experts(*(t.flatten(0, 1) for t in (x, chosen, weights))).view_as(x)
        return y if self.shared is None else y + self.shared(x)


class Prediction(nn.Module):
    """The module of multi-token prediction; embedding and output head are the network's (section 2.2)."""

    def __init__(self, config, block):
        super().__init__()
        self.enorm = RMSNorm(config.n_embd, config.norm_eps)
        self.hnorm = RMSNorm(config.n_embd, config.norm_eps)
        self.eh_proj = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.block = block
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.vocab_size = config.vocab_size

    def costs(self, length):
        width = self.eh_proj.out_features
        own = Costs(weights=linear_weights(self.eh_proj), activations=5 * width + 3 * self.vocab_size)
        return self.block.costs(length) + own

    def forward(self, x, embedded, info, cache=None):
        """x, embedded [B, T, C]: the final vectors, and the embeddings of the tokens that follow them"""
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(x)), dim=-1))
        return self.norm(self.block(x, info, cache))


class Model(GPT):
    counts = None  # tokens of each layer's experts since the last step [layers, E]

    def make_block(self, layer):
        c = self.config
        mlp = MLP(c) if layer < c.first_k_dense_replace else MoE(c)
        return Block(c, LatentAttention(c), mlp)

    def make_modules(self):
        super().make_modules()
        c = self.config
        self.mtp = Prediction(c, self.make_block(c.n_layer)) if c.num_nextn_predict_layers else None

    def costs(self, length, training):
        """The prediction module is only used in training, and needs the output head once more."""
        costs = super().costs(length, training)
        if not (self.mtp and training):
            return costs
        return costs + self.mtp.costs(length) + Costs(weights=linear_weights(self.lm_head))

    def matrices(self):
        """See GPT; also those of the prediction module, but no router, whose rows are chosen one by one."""
        parts = [self.blocks, self.mtp] if self.mtp else [self.blocks]
        routers = {moe.gate.weight for _, moe in self.mixtures()}
        return [p for part in parts for p in part.parameters() if p.dim() >= 2 and p not in routers]

    def rotary_tables(self):
        # Without YaRN's factor: LatentAttention applies it to the whole key, most of which is not rotated.
        return self.make_rotary_tables(self.config.qk_rope_head_dim)

    def init_weights(self):
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                adds = name.endswith(("attn.proj.weight", "down.weight", "experts.down"))  # see GPT
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if adds else 0.02)

    def predict(self, x, following, cache=None):
        """Final vectors x [B, T, C] and the tokens that follow [B, T] -> vectors of the ones after these."""
        info = self.position_info(following, cache)
        embedded = self.dropout(self.embed(following, info.positions))
        y = self.mtp(x, embedded, info, cache and cache.layers[0])
        if cache is not None:
            cache.advance(following.shape[1])
        return y

    def drafter(self):
        """See GPT: the prediction module guesses one token, and has a cache of its own."""
        if not self.mtp:
            return None
        capacity = self.config.block_size
        layer = self.mtp.block.new_cache(1, capacity, device=self.device, dtype=self.dtype)
        cache = Cache([layer], 1, capacity)
        return lambda x, following: [int(self.logits(self.predict(x, following, cache)[0, -1]).argmax())]

    # -- training ------------------------------------------------------------------------------------------

    def mixtures(self):
        """(number of the layer, its MoE); that of the prediction module comes last."""
        blocks = [*self.blocks, self.mtp.block] if self.mtp else self.blocks
        return [(n, block.mlp) for n, block in enumerate(blocks) if isinstance(block.mlp, MoE)]

    def auxiliary_loss(self, x, targets, mask):
        """See GPT. other_vars: mtp_loss in nats per token; balance_loss, the mean over all layers, before its
        weight (1: all experts are equally busy); expert_load/<layer>, the largest over the mean."""
        loss, other_vars = x.new_zeros((), dtype=torch.float32), {}
        if self.mtp:
            # The target of the usual loss is the input here, and the token after it the target.
            y = self.predict(x, targets)
            weights = F.pad(mask[:, 1:], (0, 1))
            losses = self.token_losses(y.flatten(0, 1), targets.roll(-1, 1).flatten())
            total = (losses * weights.flatten()).sum()
            loss = loss + self.config.mtp_loss_weight * total
            other_vars["mtp_loss"] = total.detach() / weights.sum().clamp(min=1)
        if mixtures := self.mixtures():
            # A sequence weighs what its tokens weigh in the loss, so passes add up as they do there.
            balance, counts = self.balance(mixtures, mask)
            by_sequence = balance.sum(0) * mask.sum(1)
            loss = loss + self.config.aux_loss_alpha * by_sequence.sum()
            other_vars["balance_loss"] = balance.detach().mean()
            self.counts = counts if self.counts is None else self.counts + counts
            for (layer, _), count in zip(mixtures, counts, strict=True):
                other_vars[f"expert_load/{layer}"] = count.max() / count.mean().clamp(min=1e-9)
        return loss, other_vars

    def balance(self, mixtures, loss_mask):
        """Equations 17 to 20 without alpha [layers, B], and the tokens of every expert [layers, E]."""
        scores, chosen = map(torch.stack, zip(*(moe.routing for _, moe in mixtures), strict=True))
        for _, moe in mixtures:
            moe.routing = None  # it would keep the graph of this pass alive
        # What lies behind a sequence's last word that counts is padding, all of it alike.
        # (Counted in whole numbers: CUDA adds up others in any order.)
        is_text = ((loss_mask > 0).flip(1).cumsum(1).flip(1) > 0).to(scores.dtype).unsqueeze(-1)
        picked = torch.zeros_like(scores).scatter(-1, chosen, 1.0) * is_text  # [layers, B, T, E]
        length = is_text.sum(1).clamp(min=1)
        share = (scores / scores.sum(-1, keepdim=True) * is_text).sum(2) / length
        frequency = picked.sum(2) / length * (scores.shape[-1] / chosen.shape[-1])
        return (frequency * share).sum(-1), picked.sum((1, 2))

    @torch.no_grad()
    def after_step(self, all_reduce):
        """Balance without a loss (section 2.1.2): a busy expert becomes less likely, an idle one more."""
        counts, self.counts = self.counts, None
        if counts is None or not self.config.bias_update_speed:
            return
        for (_, moe), count in zip(self.mixtures(), all_reduce(counts), strict=True):
            moe.gate.e_score_correction_bias += self.config.bias_update_speed * (count.mean() - count).sign()
