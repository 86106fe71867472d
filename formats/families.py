"""Which class of Transformers computes the same as which model of Nano.

Both sides compute the same function; they differ in the names of tensors and configuration keys, and in
which matrices are fused into one. Each `Family` is one table, used in both directions: to export and to read.
The tables are written by hand because Transformers itself is not needed for either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import UserError
from config.validation import ANY, unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from config.schema import ArchitectureConfig

Whitelist = dict[str, Any]  # {key: its implemented values}: see config.validation.unsupported

# ---- tensors ---------------------------------------------------------------------------------------


class TensorMap(NamedTuple):
    """One tensor of Nano as one or several tensors of Transformers: their names, and how to convert."""

    names: list[str]
    split: Callable[[Tensor], Iterable[Tensor]] = lambda tensor: [tensor]
    join: Callable[[list[Tensor]], Tensor] = lambda tensors: tensors[0]


def fused(prefix: str, **rows: int) -> TensorMap:
    """Several matrices that Nano stores as one, below each other. rows: {name of the matrix: its rows}."""
    return TensorMap([prefix + name for name in rows], lambda tensor: tensor.split([*rows.values()]), cat)


def cat(tensors: Iterable[Tensor], dim: int = 0) -> Tensor:
    import torch

    return torch.cat(list(tensors), dim)


def permute_rotary_rows(weight: Tensor, n_head: int, rotary_size: int, shape: tuple[int, int]) -> Tensor:
    """Reorder the last `rotary_size` rows of each head: view them as `shape` and transpose that."""
    heads = weight.unflatten(0, (n_head, -1))
    rest, rotary = heads.split((heads.shape[1] - rotary_size, rotary_size), dim=1)
    rotary = rotary.unflatten(1, shape).transpose(1, 2).flatten(1, 2)
    return cat((rest, rotary), dim=1).flatten(0, 1)


def to_interleaved(weight: Tensor, n_head: int, rotary_size: int) -> Tensor:
    """Reorder rows so that those which rotary embeddings rotate together are neighbours: 0 1, 2 3, ...

    In Nano, all first rows of the pairs come before all second rows. Only the last `rotary_size` rows of
    each head are rotated.
    """
    return permute_rotary_rows(weight, n_head, rotary_size, (2, -1))


def interleaved(name: str, n_head: int, rotary_size: int) -> TensorMap:
    """A matrix whose rotary rows are interleaved in Transformers: see `to_interleaved`."""
    return TensorMap(
        [name],
        lambda tensor: [to_interleaved(tensor, n_head, rotary_size)],
        lambda tensors: permute_rotary_rows(tensors[0], n_head, rotary_size, (-1, 2)),
    )


def experts(n_experts: int, *names: str) -> TensorMap:
    """Matrices of all experts, which Nano stores transposed and side by side: [E, in, len(names) * out]."""

    def split(tensor: Tensor) -> list[Tensor]:
        return [part.mT for matrix in tensor for part in matrix.chunk(len(names), dim=1)]

    def join(tensors: list[Tensor]) -> Tensor:
        import torch

        stacked = torch.stack(tensors).unflatten(0, (n_experts, len(names)))  # [E, names, out, in]
        return stacked.flatten(1, 2).mT

    prefix = "model.layers.N.mlp.experts."
    return TensorMap([f"{prefix}{e}.{name}.weight" for e in range(n_experts) for name in names], split, join)


# ---- the families ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """An architecture of Nano and the class of Transformers that computes the same.

    weights(config): {module or tensor of Nano: its name in Transformers, or a TensorMap}. The N in
        model.layers.N stands for the layer's number.
    keys: {key of config.json: key of Nano's configuration}
    nano_fixed, hf_fixed: keys that have only one possible value in this family, on either side
    requires: {what the class of Transformers requires: function(config) that checks it}
    hf_yarn_fixed: keys of YaRN's rope_scaling that only config.json has
    """

    architecture: str
    class_name: str
    model_type: str
    weights: Callable[[Any], dict[str, str | TensorMap]]
    keys: dict[str, str]
    nano_fixed: dict[str, Any] = field(default_factory=dict)
    hf_fixed: dict[str, Any] = field(default_factory=dict)
    requires: dict[str, Callable[[Any], bool]] = field(default_factory=dict)
    hf_yarn_fixed: dict[str, Any] = field(default_factory=dict)


# Keys that all families have.
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "intermediate_size": "n_hidden",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "block_size",
    "rms_norm_eps": "norm_eps",
}
WEIGHTS: dict[str, str | TensorMap] = {
    "wte": "model.embed_tokens",
    "blocks.N.attn_norm": "model.layers.N.input_layernorm",
    "blocks.N.attn.proj": "model.layers.N.self_attn.o_proj",
    "blocks.N.mlp_norm": "model.layers.N.post_attention_layernorm",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
HEAD_KEYS = {"num_key_value_heads": "n_kv_head", "head_dim": "head_dim"}
# Values of keys that are missing in a config.json. None: the default of Nano's configuration.
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "q_lora_rank": None,
    "num_nextn_predict_layers": None,
    "bias_update_speed": None,
    "aux_loss_alpha": None,
    "mtp_loss_weight": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def fused_qkv(c: Any) -> TensorMap:
    queries, keys = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    return fused("model.layers.N.self_attn.", q_proj=queries, k_proj=keys, v_proj=keys)


def nano_weights(c: Any) -> dict[str, str | TensorMap]:
    return WEIGHTS | {
        "blocks.N.attn.qkv": fused_qkv(c),
        "blocks.N.attn.q_norm": "model.layers.N.self_attn.q_norm",
        "blocks.N.attn.k_norm": "model.layers.N.self_attn.k_norm",
        "blocks.N.mlp.gate_up": fused("model.layers.N.mlp.", gate_proj=c.n_hidden, up_proj=c.n_hidden),
        "blocks.N.mlp.down": "model.layers.N.mlp.down_proj",
    }


def nanochat_weights(c: Any) -> dict[str, str | TensorMap]:
    return WEIGHTS | {
        "blocks.N.attn.qkv": fused_qkv(c),
        "blocks.N.mlp.up": "model.layers.N.mlp.fc1",
        "blocks.N.mlp.down": "model.layers.N.mlp.fc2",
    }


def deepseek_v3_weights(c: Any) -> dict[str, str | TensorMap]:
    attention, mlp, mtp = (f"model.layers.{part}." for part in ("N.self_attn", "N.mlp", c.n_layer))
    n_shared = c.n_shared_experts * c.moe_intermediate_size
    rope = c.qk_rope_head_dim
    return WEIGHTS | {
        "blocks.N.attn.q": interleaved(attention + "q_proj", c.n_head, rope),
        "blocks.N.attn.q_a": attention + "q_a_proj",
        "blocks.N.attn.q_norm": attention + "q_a_layernorm",
        "blocks.N.attn.q_b": interleaved(attention + "q_b_proj", c.n_head, rope),
        "blocks.N.attn.kv_a": interleaved(attention + "kv_a_proj_with_mqa", 1, rope),
        "blocks.N.attn.kv_norm": attention + "kv_a_layernorm",
        "blocks.N.attn.kv_b": attention + "kv_b_proj",
        "blocks.N.mlp.gate_up": fused(mlp, gate_proj=c.n_hidden, up_proj=c.n_hidden),
        "blocks.N.mlp.down": mlp + "down_proj",
        "blocks.N.mlp.gate": mlp + "gate",
        "blocks.N.mlp.experts.gate_up": experts(c.n_routed_experts, "gate_proj", "up_proj"),
        "blocks.N.mlp.experts.down": experts(c.n_routed_experts, "down_proj"),
        "blocks.N.mlp.shared.gate_up": fused(mlp + "shared_experts.", gate_proj=n_shared, up_proj=n_shared),
        "blocks.N.mlp.shared.down": mlp + "shared_experts.down_proj",
        # The multi-token prediction module is stored as one more layer after the last.
        "mtp.enorm": mtp + "enorm",
        "mtp.hnorm": mtp + "hnorm",
        "mtp.eh_proj": mtp + "eh_proj",
        "mtp.norm": mtp + "shared_head.norm",
    }


FAMILIES = (
    Family(
        "nano", "Qwen3ForCausalLM", "qwen3", nano_weights,
        KEYS | HEAD_KEYS | {"tie_word_embeddings": "tie_embeddings"},
        nano_fixed={"qk_norm": True, "use_rope": True, "is_causal": True, "bias": False},
        hf_fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    ),
    Family(
        "nano", "LlamaForCausalLM", "llama", nano_weights,
        KEYS | HEAD_KEYS
        | {"tie_word_embeddings": "tie_embeddings", "attention_bias": "bias", "mlp_bias": "bias"},
        nano_fixed={"qk_norm": False, "use_rope": True, "is_causal": True},
        hf_fixed={"hidden_act": "silu"},
        requires={"an n_embd divisible by n_head": lambda c: c.n_embd % c.n_head == 0},
    ),
    Family(
        "nanochat", "NanoChatForCausalLM", "nanochat", nanochat_weights,
        KEYS | HEAD_KEYS,
        hf_fixed={
            "hidden_act": "relu2", "attention_bias": False, "tie_word_embeddings": False,
            "final_logit_softcapping": 15.0,
        },
    ),
    Family(
        "deepseek_v3", "DeepseekV3ForCausalLM", "deepseek_v3", deepseek_v3_weights,
        KEYS | {"num_key_value_heads": "n_head", "tie_word_embeddings": "tie_embeddings"}
        | {key: key for key in (
            "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
            "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
            "moe_intermediate_size", "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob",
            "num_nextn_predict_layers", "bias_update_speed", "aux_loss_alpha", "mtp_loss_weight",
        )},
        hf_fixed={
            "hidden_act": "silu", "attention_bias": False, "rope_interleave": True, "moe_layer_freq": 1,
            "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        },
        requires={
            "a shared expert": lambda c: c.n_shared_experts > 0,
            "groups of at least two experts": lambda c: c.n_routed_experts >= 2 * c.n_group,
        },
        hf_yarn_fixed={"mscale": 1.0, "mscale_all_dim": 1.0},
    ),
)  # fmt: skip


# ---- the configuration -----------------------------------------------------------------------------


ROPE_SCALING: Whitelist = {
    "rope_scaling": (None,),
    "rope_scaling.rope_type": ("llama3", "yarn"),
    "rope_scaling.factor": ANY,
    "rope_scaling.original_max_position_embeddings": ANY,
    "rope_scaling.low_freq_factor": ANY,
    "rope_scaling.high_freq_factor": ANY,
    "rope_scaling.beta_fast": ANY,
    "rope_scaling.beta_slow": ANY,
}


def implemented(family: Family) -> Whitelist:
    """The keys and values of Nano's configuration that a class of Transformers implements: a whitelist for
    `config.validation.unsupported`."""
    return {
        "architecture": (family.architecture,),
        "dropout": ANY,  # only matters in training
        "rope_theta": ANY,
        **ROPE_SCALING,
        **dict.fromkeys(family.keys.values(), ANY),
        **{key: (value,) for key, value in family.nano_fixed.items()},
    }


def find_family(config: ArchitectureConfig) -> Family | None:
    """The Family of a model, or the one that comes closest: `unsupported_reason` says what it lacks."""

    def n_differing(family: Family) -> int:
        return sum(getattr(config, key) != value for key, value in family.nano_fixed.items())

    families = [family for family in FAMILIES if family.architecture == config.architecture]
    return min(families, key=n_differing, default=None)


def unsupported_reason(config: ArchitectureConfig) -> str | None:
    """Why no class of Transformers computes the same as a model of Nano, or None if one does."""
    if not (family := find_family(config)):
        known = sorted({family.architecture for family in FAMILIES})
        return f"{config.architecture} cannot be written for Transformers; {', '.join(known)} can"
    if reason := unsupported(config, implemented(family), f"a {family.class_name}"):
        return reason
    missing = [what for what, is_met in family.requires.items() if not is_met(config)]
    return f"a {family.class_name} needs {missing[0]}, which this model does not have" if missing else None


def to_hf_config(family: Family, config: ArchitectureConfig) -> dict[str, Any]:
    """The part of config.json that describes the shape of a model."""
    scaling = config.rope_scaling.model_dump() if config.rope_scaling else None
    if scaling and scaling["rope_type"] == "yarn":
        scaling |= family.hf_yarn_fixed
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **{hf_key: getattr(config, key) for hf_key, key in family.keys.items()},
        **family.hf_fixed,
        # Old and new releases of Transformers both read these two keys.
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }


# Keys of config.json that say nothing about the shape of a network, or are handled in `from_hf_config`.
IGNORED_KEYS = {
    "architectures", "model_type", "auto_map", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "initializer_range", "_name_or_path",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",  # see `from_hf_config`
    "head_dim", "qk_head_dim", "sliding_window", "max_window_layers", "layer_types",  # follow from others
    "pretraining_tp", "ep_size", "seq_aux", "output_router_logits",  # how it was trained
}  # fmt: skip


def unknown_keys(family: Family, hf_config: dict[str, Any]) -> list[str]:
    """The keys of a config.json that `from_hf_config` does not know, except those that are null or false."""
    known = IGNORED_KEYS | family.keys.keys() | family.hf_fixed.keys()
    return sorted(key for key, value in hf_config.items() if key not in known and value not in (None, False))


def from_hf_config(hf_config: dict[str, Any], source: str) -> tuple[Family, Any]:
    """(Family, Nano's configuration) from the content of a config.json.

    source: the file's name, for error messages. Raises UserError if Nano has no such model.
    """
    from models import check_config

    name = hf_config.get("model_type")
    family = next((family for family in FAMILIES if family.model_type == name), None)
    if family is None:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise UserError(f"{source}: its model_type is {json.dumps(name)}; Nano reads {known}")
    for key, value in family.hf_fixed.items():
        if hf_config.get(key, value) != value:
            found = json.dumps(hf_config[key])
            raise UserError(f"{source}: {key} is {found}; Nano has only {json.dumps(value)}")
    values = {"architecture": family.architecture, **family.nano_fixed}
    for hf_key, key in family.keys.items():
        if hf_config.get(hf_key) is None and hf_key not in DEFAULTS:
            raise UserError(f"{source}: {hf_key} is missing")
        value = hf_config.get(hf_key, DEFAULTS.get(hf_key))
        if value is not None and values.setdefault(key, value) != value:
            raise UserError(f"{source}: {hf_key} contradicts another key; Nano has one key for both, {key}")
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: its rope_parameters is not a JSON object")
    rope = {"rope_type" if key == "type" else key: rope[key] for key in rope if rope[key] is not None}
    values["rope_theta"] = rope.pop("rope_theta", hf_config.get("rope_theta", 10000.0))
    rotary_share = rope.pop("partial_rotary_factor", hf_config.get("partial_rotary_factor", 1.0))
    if rotary_share != 1.0:
        raise UserError(f"{source}: partial_rotary_factor is {json.dumps(rotary_share)}; Nano has only 1.0")
    if rope.get("rope_type") == "yarn":
        for key, value in family.hf_yarn_fixed.items():
            if rope.pop(key, None) != value:
                raise UserError(f"{source}: {key} of YaRN must be {json.dumps(value)}")
    values["rope_scaling"] = None if rope in ({}, {"rope_type": "default"}) else rope
    config = check_config(values, f"{source}, in Nano's names")
    return family, config.resolved(config.vocab_size)


# ---- the weights -----------------------------------------------------------------------------------


def tensor_maps(family: Family, config: Any, names: Iterable[str]) -> Iterator[tuple[str, TensorMap]]:
    """Yield (name, TensorMap) for tensors of Nano, with the full names of Transformers' tensors.

    Raises UserError for a tensor that the family does not have.
    """
    table = family.weights(config)
    for name in names:
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        key = name.replace("mtp.block.", f"blocks.{config.n_layer}.")
        layer = found[1] if (found := re.match(r"blocks\.(\d+)", key)) else ""
        key = re.sub(r"^blocks\.\d+", "blocks.N", key)
        module, _, kind = key.rpartition(".")
        entry, suffix = (table[key], "") if key in table else (table.get(module), "." + kind)
        if not entry:
            raise UserError(f"a {family.class_name} has no place for {name}, a part of this model")
        mapping = entry if isinstance(entry, TensorMap) else TensorMap([entry])
        hf_names = [hf_name.replace(".N.", f".{layer}.") + suffix for hf_name in mapping.names]
        yield name, mapping._replace(names=hf_names)


def to_hf_weights(family: Family, config: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dictionary of Nano to {name: tensor} of Transformers."""
    weights: dict[str, Tensor] = {}
    for name, mapping in tensor_maps(family, config, state):
        weights.update(zip(mapping.names, mapping.split(state[name]), strict=True))
    return weights


def from_hf_weights(
    family: Family, config: Any, readers: dict[str, Callable[[], Tensor]]
) -> dict[str, Tensor]:
    """Convert weights of Transformers to a state dictionary of Nano.

    readers: {name: function that reads the tensor}, for all tensors that there are.
    Raises UserError if a tensor is missing, unknown, or of another shape or type than the configuration says.
    """
    import torch

    import models

    def require(name: str) -> None:
        if name not in readers:
            raise UserError(f"the weights lack {name}, which config.json requires")

    # Check the last layer before creating that many layers.
    require(f"model.layers.{config.n_layer - 1}.self_attn.o_proj.weight")
    expected: dict[str, Tensor] = {}
    with torch.device("meta"):
        shapes = models.build(config).state_dict()
    for name, mapping in tensor_maps(family, config, shapes):
        for hf_name in mapping.names:
            require(hf_name)
        expected.update(zip(mapping.names, mapping.split(shapes[name]), strict=True))
    unknown = [name for name in readers if name not in expected and not is_redundant(name, config)]
    if unknown:
        raise UserError(f"the weights contain {min(unknown)}, which config.json does not account for")

    def read(name: str) -> Tensor:
        tensor, shape = readers[name](), expected[name].shape
        if tensor.shape != shape:
            raise UserError(f"{name} has shape {list(tensor.shape)}; by config.json it is {list(shape)}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{name} is {tensor.dtype}; only float32, bfloat16 and float16 can be read")
        return tensor

    state = {
        name: mapping.join([read(hf_name) for hf_name in mapping.names]).contiguous()
        for name, mapping in tensor_maps(family, config, shapes)
    }
    if config.tie_embeddings:
        state["lm_head.weight"] = state["wte.weight"]
    return state


def is_redundant(name: str, config: Any) -> bool:
    """Whether a tensor of Transformers can be computed from others, or is a copy of another."""
    return bool(
        name.endswith("rotary_emb.inv_freq")
        or (name == "lm_head.weight" and config.tie_embeddings)
        or re.fullmatch(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight", name)
    )
