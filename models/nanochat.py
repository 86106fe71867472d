"""nanochat (Karpathy 2025): a minimal decoder whose whole shape follows from its depth.

Differences from model.py: the RMSNorms have no weights, and there is one more after the embedding; the MLP
uses squared ReLU (So et al. 2021, "Primer", section 3); the head is untied, and its logits are soft-capped at
15. Rotary positions rotate in the opposite direction, so that published weights can be used unchanged.
"""

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

import model
from config.schema import ArchitectureConfig

LOGIT_SOFTCAP = 15.0


class Config(ArchitectureConfig):
    """config/model_config.json for nanochat: n_layer sets the size; the other sizes may stay null."""

    bias: ClassVar[bool] = False
    use_rope: ClassVar[bool] = True
    is_causal: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = False  # model.py's norm, which has weights; `Block` adds one without
    tie_embeddings: ClassVar[bool] = False  # type: ignore[misc]  # a key of other architectures

    architecture: Literal["nanochat"] = Field("nanochat", description="which model to build")
    n_embd: int | None = Field(  # type: ignore[assignment]  # null is allowed here
        None, ge=1, le=1 << 16, description="width: size of a token's vector; null: 64 n_layer"
    )
    n_head: int | None = Field(  # type: ignore[assignment]  # null is allowed here
        None, ge=1, le=1024, description="query heads per layer; null: as few as make head_dim 128 or less"
    )
    n_kv_head: int | None = Field(
        None, ge=1, le=1024, description="key/value heads per layer; must divide n_head; null: n_head"
    )
    head_dim: int | None = Field(None, ge=1, le=4096, description="size of one head; null: n_embd / n_head")
    n_hidden: int | None = Field(None, ge=1, le=1 << 18, description="width inside the MLP; null: 4 n_embd")
    norm_eps: float = Field(1e-6, gt=0, lt=1, description="added to the mean square in RMSNorm")

    @model_validator(mode="after")
    def _shapes_fit(self) -> "Config":
        c: Any = self.resolved(None)
        if not self.head_dim and c.n_embd % (2 * c.n_head):
            raise ValueError(
                f"n_embd={c.n_embd} does not divide into {c.n_head} heads of an even size; "
                f"change n_embd or n_head, or set head_dim"
            )
        if c.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, found {c.head_dim}")
        if c.n_head % c.n_kv_head:
            raise ValueError(f"n_kv_head={c.n_kv_head} does not divide n_head={c.n_head}")
        return self

    def implied(self) -> dict[str, Any]:
        width = self.n_embd or 64 * self.n_layer
        fewest = -(-width // (self.head_dim or 128))
        even = (n for n in range(fewest, min(width // 2, 1024) + 1) if width % (2 * n) == 0)
        n_head = self.n_head or (fewest if self.head_dim else next(even, fewest))
        return {
            "n_embd": width,
            "n_head": n_head,
            "n_kv_head": self.n_kv_head or n_head,
            "head_dim": self.head_dim or width // n_head,
            "n_hidden": self.n_hidden or 4 * width,
        }


class MLP(nn.Module):
    """down(relu(up(x))²)"""

    def __init__(self, config: Any):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def costs(self) -> model.Costs:
        return model.Costs(weights=model.linear_weights(self), activations=2 * self.down.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().square())


class Block(model.Block):
    """model.py's block with nanochat's norms and MLP."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.attn_norm = self.mlp_norm = norm(config, config.n_embd)
        self.attn.q_norm = self.attn.k_norm = norm(config, config.head_dim)
        self.mlp = MLP(config)

    def costs(self, length: int) -> model.Costs:
        # The norms have no weights, so their inputs need not be kept for a gradient.
        return super().costs(length) + model.Costs(activations=-2 * self.n_embd)


def norm(config: Any, size: int) -> nn.RMSNorm:
    """An RMSNorm without weights."""
    return nn.RMSNorm(size, config.norm_eps, elementwise_affine=False)


class Model(model.GPT):
    """See the top of this file."""

    logit_softcap = LOGIT_SOFTCAP

    def make_modules(self) -> None:
        super().make_modules()
        self.norm = norm(self.config, self.config.n_embd)

    def make_block(self, layer: int) -> Block:
        return Block(self.config)

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        nn.init.normal_(self.wte.weight, std=0.02)  # the norm after it removes the scale
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.blocks:
            # Every block starts as the identity.
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.down.weight)

    def rotary_tables(self) -> tuple[Tensor, Tensor]:
        # The opposite direction. No YaRN factor: the norms of queries and keys would undo it.
        cos, sin = self.make_rotary_tables(self.config.head_dim)
        return cos, -sin

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.norm(super().embed(tokens, positions))
