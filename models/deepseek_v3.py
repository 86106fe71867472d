"""DeepSeek-V3 (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report"), in sizes that fit on one machine.

Three parts differ from model.py's network:

- Multi-head latent attention (MLA, section 2.1.1): the keys and values of all heads are computed from one
  short vector per token, the latent. The KV cache holds only the latent and one rotary key, which all heads
  share.
- Mixture of experts (DeepSeekMoE, section 2.1.2): a token passes through the shared experts and through
  `num_experts_per_tok` of many small routed experts, those with the highest scores. A bias that is added to
  the scores, and adjusted after each step, balances the load. No token is ever dropped.
- Multi-token prediction (MTP, section 2.2): one more block predicts the token after the next one. In training
  it adds a second loss; in greedy decoding it drafts tokens, which the network then accepts or corrects.

How the weights differ from the released ones: `q_a`, `q_norm`, `q_b` (or `q`), `kv_a`, `kv_norm`, `kv_b` and
`proj` are called q_a_proj, q_a_layernorm, q_b_proj (q_proj), kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj
and o_proj there, and `mtp.norm` is shared_head.norm. Rotary rows (the last qk_rope_head_dim of each head in
q_b or q, and of kv_a) are interleaved there (0 1, 2 3, ...); here all first halves come before all second
halves. The experts' matrices are transposed here, [E, in, out], with gate and up side by side.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

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
    PositionInfo,
    RMSNorm,
    apply_rotary_emb,
    attention_factor,
    linear_weights,
)

LATENT_EPS = 1e-6  # epsilon of the latents' norms; norm_eps is for the others
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
    q_lora_rank: Size | None = Field(None, description="size of the queries' latent; null: no latent")
    kv_lora_rank: Size = Field(64, description="size of the latent of keys and values")
    qk_nope_head_dim: Size = Field(32, description="size of the part of a head's key without RoPE")
    qk_rope_head_dim: Size = Field(32, description="size of the part with RoPE, shared by all heads; even")
    v_head_dim: Size = Field(64, description="size of a head's value; fastest if equal to that of its key")
    n_routed_experts: Size = Field(16, description="routed experts per layer")
    n_shared_experts: int = Field(1, ge=0, le=1024, description="shared experts, used by every token")
    num_experts_per_tok: Size = Field(4, description="routed experts that a token uses")
    n_group: Size = Field(4, description="groups of routed experts")
    topk_group: Size = Field(2, description="groups whose experts a token may use")
    moe_intermediate_size: Size = Field(128, description="width inside an expert")
    first_k_dense_replace: int = Field(1, ge=0, le=1024, description="first layers, which have a dense MLP")
    routed_scaling_factor: float = Field(
        2.0, gt=0, le=1000, description="scale of the routed experts' sum; about sqrt(num_experts_per_tok)")
    norm_topk_prob: bool = Field(True, description="normalize the weights of a token's experts to sum to 1")
    num_nextn_predict_layers: int = Field(1, ge=0, le=1, description="1: also predict the token after next")
    bias_update_speed: float = Field(
        0.01, ge=0, le=1, description="change per step of the bias that balances the experts; "
        "DeepSeek's 0.001 is for much longer runs; 0: off")
    aux_loss_alpha: float = Field(1e-4, ge=0, le=10, description="weight of the sequence-wise balance loss")
    mtp_loss_weight: float = Field(0.3, ge=0, le=10, description="weight of the multi-token prediction loss")
    # fmt: on

    @model_validator(mode="after")
    def _shapes_fit(self) -> "Config":
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


class MultiHeadLatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, section 2.1). H heads, latents of size R."""

    def make_projections(self, config: Any) -> None:
        c = self.config = config
        self.sizes = c.qk_nope_head_dim, c.qk_rope_head_dim
        self.yarn_factor = attention_factor(c.rope_scaling) ** 2  # of the products of queries and keys
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

    def new_cache(self, batch_size: int, capacity: int, **options: Any) -> KVCache:
        return KVCache(batch_size, 1, capacity, self.config.kv_lora_rank + self.sizes[1], 0, **options)

    def costs(self, length: int) -> Costs:
        c = self.config
        per_head = 6 * c.qk_nope_head_dim + 5 * c.qk_rope_head_dim + c.v_head_dim
        return Costs(
            weights=linear_weights(self),
            attention_flops=2 * c.n_head * (sum(self.sizes) + c.v_head_dim) * length,
            activations=c.n_head * per_head + 2 * (c.q_lora_rank or 0) + 3 * c.kv_lora_rank,
            attention_scores=c.n_head * length,
        )

    def forward(self, x: Tensor, info: PositionInfo, cache: Any = None) -> Tensor:
        B, T, _ = x.shape
        c = self.config
        rotary: Any = info.rotary
        q = self.q_b(self.q_norm(self.q_a(x))) if c.q_lora_rank else self.q(x)
        q = q if self.yarn_factor == 1 else q * self.yarn_factor
        q_nope, q_rope = q.view(B, T, c.n_head, -1).split(self.sizes, dim=-1)
        q_rope = apply_rotary_emb(q_rope, *rotary).to(q.dtype)
        latent, k_rope = self.kv_a(x).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        latent, k_rope = self.kv_norm(latent), apply_rotary_emb(k_rope.unsqueeze(2), *rotary).to(q.dtype)
        cached = None
        if cache is not None:
            new = torch.cat((latent, k_rope.squeeze(2)), dim=-1).unsqueeze(1)
            cached, _ = cache.update(new, new[..., :0], info)  # [B, 1, S, R + rope]
        if cached is None or cached.shape[2] == T:
            y = self.attend_expanded(q_nope, q_rope, latent, k_rope, info.mask)
        else:
            y = self.attend_absorbed(q_nope, q_rope, cached, info.mask)
        return self.proj(y.reshape(B, T, -1))

    def attend_expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention without a past: compute keys and values of every head. Returns [B, T, H, v_head_dim]."""
        c = self.config
        k, v = self.kv_b(latent).unflatten(-1, (c.n_head, -1)).split((self.sizes[0], c.v_head_dim), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k, k_rope.expand_as(q_rope)), dim=-1)
        v = F.pad(v, (0, sum(self.sizes) - c.v_head_dim))  # not all kernels allow values of another size
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return y.transpose(1, 2)[..., : c.v_head_dim]

    def attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, cached: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of a few tokens to a past, `cached` [B, 1, S, R + rope]. Returns [B, T, H, v_head_dim].

        kv_b is absorbed: it is applied to the queries instead of the keys, and to the weighted sum instead of
        the values, so past tokens need no products (DeepSeek-V2, section 2.1.2). All heads share the vectors
        they attend to.
        """
        c = self.config
        weight = self.kv_b.weight.view(c.n_head, -1, c.kv_lora_rank)
        to_key, to_value = weight.split((self.sizes[0], c.v_head_dim), dim=1)
        q = torch.cat((torch.einsum("bthd,hdr->bhtr", q_nope, to_key), q_rope.transpose(1, 2)), dim=-1)
        y = self.attend(q, cached, cached, mask, scale=1 / math.sqrt(sum(self.sizes)))[..., : c.kv_lora_rank]
        return torch.einsum("bhtr,hdr->bthd", y, to_value)


class Router(nn.Linear):
    """Chooses the experts of each token. Computes in float32, whatever the dtype of the rest."""

    e_score_correction_bias: Tensor

    def __init__(self, config: Any):
        super().__init__(config.n_embd, config.n_routed_experts, bias=False)
        self.config = config
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Router":
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        # Keep the bias in float32: a lower precision would lose its small changes.
        self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # more than nn.Linear
        """x [B, T, C] -> scores [B, T, E] between 0 and 1, and the chosen experts [B, T, K]"""
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


class RoutedExperts(nn.Module):
    """The MLPs of all routed experts: stacked matrices [E, in, out]."""

    def __init__(self, config: Any):
        super().__init__()
        E, C, M = config.n_routed_experts, config.n_embd, config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(E, C, 2 * M))
        self.down = nn.Parameter(torch.empty(E, M, C))
        self.n_chosen = config.num_experts_per_tok

    def costs(self) -> Costs:
        E, C, M = self.down.shape[0], self.down.shape[2], self.down.shape[1]
        return Costs(weights=self.n_chosen * 3 * C * M, activations=self.n_chosen * (4 * M + 3 * C) + 6 * E)

    @torch.compiler.disable  # the number of tokens of each expert is only known at run time
    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [N, C], the experts of each token and their weights [N, K] -> weighted sum of outputs [N, C]"""
        N, K = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # the N * K pairs (token, expert), sorted by expert
        sizes = chosen.flatten().bincount(minlength=len(self.gate_up))
        # Not x[order // K]: several threads would sum its gradient in an undefined order.
        rows = x.unsqueeze(1).expand(-1, K, -1).flatten(0, 1)[order]
        gate, up = kernels.grouped_matmul(rows, self.gate_up, sizes).chunk(2, dim=-1)
        y = kernels.grouped_matmul(F.silu(gate) * up, self.down, sizes)
        y = torch.empty_like(y).index_copy(0, order, y).view(N, K, -1)
        return (y * weights.unsqueeze(-1).to(y.dtype)).sum(1)


class MoE(nn.Module):
    """The shared experts, computed as one MLP, plus each token's routed experts (equations 12 to 16)."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.gate, self.experts = Router(config), RoutedExperts(config)
        self.routing: tuple[Tensor, Tensor] | None = None  # scores and choices, for `Model.balance_loss`
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared = MLP(config.model_copy(update={"n_hidden": shared})) if shared else None

    def costs(self) -> Costs:
        costs = Costs(weights=linear_weights(self.gate)) + self.experts.costs()
        return costs + self.shared.costs() if self.shared else costs

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.gate(x)
        weights = scores.gather(-1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.config.routed_scaling_factor
        self.routing = (scores, chosen) if self.training else None
        y = self.experts(*(t.flatten(0, 1) for t in (x, chosen, weights))).view_as(x)
        return y if self.shared is None else y + self.shared(x)


class MTPModule(nn.Module):
    """The module of multi-token prediction. It shares embedding and output head (section 2.2)."""

    def __init__(self, config: Any, block: nn.Module):
        super().__init__()
        self.enorm = RMSNorm(config.n_embd, config.norm_eps)
        self.hnorm = RMSNorm(config.n_embd, config.norm_eps)
        self.eh_proj = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.block: Any = block
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.vocab_size = config.vocab_size

    def costs(self, length: int) -> Costs:
        width = self.eh_proj.out_features
        own = Costs(weights=linear_weights(self.eh_proj), activations=5 * width + 3 * self.vocab_size)
        return self.block.costs(length) + own

    def forward(self, x: Tensor, embedded: Tensor, info: PositionInfo, cache: Any = None) -> Tensor:
        """x, embedded [B, T, C]: the final vectors, and the embeddings of the tokens that follow them"""
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(x)), dim=-1))
        return self.norm(self.block(x, info, cache))


class Model(GPT):
    """See the top of this file."""

    expert_counts: Tensor | None = None  # tokens of each layer's experts since the last step [layers, E]

    def make_block(self, layer: int) -> Block:
        c = self.config
        mlp = MLP(c) if layer < c.first_k_dense_replace else MoE(c)
        return Block(c, MultiHeadLatentAttention(c), mlp)

    def make_modules(self) -> None:
        super().make_modules()
        c = self.config
        self.mtp = MTPModule(c, self.make_block(c.n_layer)) if c.num_nextn_predict_layers else None

    def costs(self, length: int, training: bool) -> Costs:
        """See GPT. The MTP module is used only in training, and uses the output head once more."""
        costs = super().costs(length, training)
        if not (self.mtp and training):
            return costs
        return costs + self.mtp.costs(length) + Costs(weights=linear_weights(self.lm_head))

    def matrices(self) -> list[nn.Parameter]:
        """See GPT. Includes the MTP module's, but not the routers: their rows act independently."""
        parts = [self.blocks, self.mtp] if self.mtp else [self.blocks]
        routers = {moe.gate.weight for _, moe in self.moe_layers()}
        return [p for part in parts for p in part.parameters() if p.dim() >= 2 and p not in routers]

    def rotary_tables(self) -> tuple[Tensor, Tensor]:
        # Without YaRN's factor: it also applies to the parts without RoPE, so the attention multiplies by it.
        return self.make_rotary_tables(self.config.qk_rope_head_dim)

    def init_weights(self) -> None:
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                adds = name.endswith(("attn.proj.weight", "down.weight", "experts.down"))  # to the stream
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if adds else 0.02)

    def predict(self, x: Tensor, following: Tensor, cache: Cache | None = None) -> Tensor:
        """Run the MTP module: final vectors x [B, T, C] and the following tokens [B, T] -> vectors [B, T, C],
        from which the output head predicts the tokens after those."""
        assert self.mtp, "num_nextn_predict_layers is 0"
        info = self.position_info(following, cache)
        embedded = self.dropout(self.embed(following, info.positions))
        y = self.mtp(x, embedded, info, cache and cache.layers[0])
        if cache is not None:
            cache.advance(following.shape[1])
        return y

    def drafter(self) -> Callable[[Tensor, Tensor], list[int]] | None:
        """See GPT. The MTP module drafts one token, and has its own cache."""
        if not self.mtp:
            return None
        capacity = self.config.block_size
        layer = self.mtp.block.new_cache(1, capacity, device=self.device, dtype=self.dtype)
        cache = Cache([layer], 1, capacity)
        return lambda x, following: [int(self.logits(self.predict(x, following, cache)[0, -1]).argmax())]

    # -- training ------------------------------------------------------------------------------------------

    def moe_layers(self) -> list[tuple[int, MoE]]:
        """(layer, its MoE) of all layers that have one; the MTP module's comes last."""
        blocks = [*self.blocks, self.mtp.block] if self.mtp else self.blocks
        return [(n, block.mlp) for n, block in enumerate(blocks) if isinstance(block.mlp, MoE)]

    def auxiliary_loss(
        self, x: Tensor, targets: Tensor, mask: Tensor
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """See GPT. Metrics: mtp_loss, in nats per token; balance_loss, without its weight, averaged over the
        layers (1 if the load is even); expert_load/<layer>, the largest load over the mean."""
        loss, metrics = x.new_zeros((), dtype=torch.float32), {}
        if self.mtp:
            # The targets of the main loss are the inputs here, and the tokens after them the targets.
            y = self.predict(x, targets)
            weights = F.pad(mask[:, 1:], (0, 1))
            losses = self.token_losses(y.flatten(0, 1), targets.roll(-1, 1).flatten())
            total = (losses * weights.flatten()).sum()
            loss = loss + self.config.mtp_loss_weight * total
            metrics["mtp_loss"] = total.detach() / weights.sum().clamp(min=1)
        if layers := self.moe_layers():
            # Weighted by the tokens that count, so that micro-batches add up as in the main loss.
            balance, counts = self.balance_loss(layers, mask)
            by_sequence = balance.sum(0) * mask.sum(1)
            loss = loss + self.config.aux_loss_alpha * by_sequence.sum()
            metrics["balance_loss"] = balance.detach().mean()
            self.expert_counts = counts if self.expert_counts is None else self.expert_counts + counts
            for (layer, _), count in zip(layers, counts, strict=True):
                metrics[f"expert_load/{layer}"] = count.max() / count.mean().clamp(min=1e-9)
        return loss, metrics

    def balance_loss(self, layers: list[tuple[int, MoE]], loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Equations 17 to 20 without alpha [layers, B], and the tokens per expert [layers, E]."""
        routings: Any = (moe.routing for _, moe in layers)
        scores, chosen = map(torch.stack, zip(*routings, strict=True))
        for _, moe in layers:
            moe.routing = None  # it would keep the graph of this pass alive
        # After the last token that counts there is only padding, which must not count as load.
        # (A cumulative sum of integers: on CUDA, the order of a sum of floats is undefined.)
        is_text = ((loss_mask > 0).flip(1).cumsum(1).flip(1) > 0).to(scores.dtype).unsqueeze(-1)
        picked = torch.zeros_like(scores).scatter(-1, chosen, 1.0) * is_text  # [layers, B, T, E]
        length = is_text.sum(1).clamp(min=1)
        share = (scores / scores.sum(-1, keepdim=True) * is_text).sum(2) / length
        frequency = picked.sum(2) / length * (scores.shape[-1] / chosen.shape[-1])
        return (frequency * share).sum(-1), picked.sum((1, 2))

    @torch.no_grad()
    def after_step(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Auxiliary-loss-free load balancing (section 2.1.2): overloaded experts become less likely."""
        counts, self.expert_counts = self.expert_counts, None
        if counts is None or not self.config.bias_update_speed:
            return
        for (_, moe), count in zip(self.moe_layers(), all_reduce(counts), strict=True):
            moe.gate.e_score_correction_bias += self.config.bias_update_speed * (count.mean() - count).sign()
