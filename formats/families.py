"""Nano's networks and the classes of Transformers that compute the same.

The networks are the same on both sides; names, and what is stored as one matrix, differ. So every family
here is one table, which is read in both directions. Transformers itself is not needed.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from common.config import ANY, unsupported
from common.errors import UserError

# ---- the families ----------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What one tensor of ours is on the other side: their names, and how to get there and back."""

    names: list
    split: Callable = lambda tensor: [tensor]
    join: Callable = lambda parts: parts[0]


def stacked(prefix, **rows):
    """Several matrices, of so many rows each, that lie in one of ours."""
    return Parts([prefix + name for name in rows], lambda tensor: tensor.split(list(rows.values())), joined)


def joined(parts, dim=0):
    import torch

    return torch.cat(parts, dim)


def reordered(tensor, n_head, size, shape):
    """Of each head's rows the last `size` in another order: seen as a matrix of this shape, transposed."""
    heads = tensor.unflatten(0, (n_head, -1))
    still, turned = heads.split((heads.shape[1] - size, size), dim=1)
    turned = turned.unflatten(1, shape).transpose(1, 2).flatten(1, 2)
    return joined((still, turned), dim=1).flatten(0, 1)


def in_pairs(tensor, n_head, size):
    """Rows that rotary positions turn together lie side by side, 0 1, 2 3, ...; in ours, all first ones come
    before all second ones. The last `size` rows of each head are turned."""
    return reordered(tensor, n_head, size, (2, -1))


def interleaved(name, n_head, size):
    """A matrix whose rows are in pairs there: see `in_pairs`."""
    return Parts(
        [name],
        lambda ours: [in_pairs(ours, n_head, size)],
        lambda parts: reordered(parts[0], n_head, size, (-1, 2)),
    )


def experts(n_experts, *names):
    """Matrices of all experts, transposed, those of `names` side by side: [E, in, len(names) * out]."""

    def split(tensor):
        return [part.mT for matrix in tensor for part in matrix.chunk(len(names), dim=1)]

    def join(parts):
        import torch

        rows = torch.stack(parts).unflatten(0, (n_experts, len(names)))  # [E, names, out, in]
        return rows.flatten(1, 2).mT

    prefix = "model.layers.N.mlp.experts."
    return Parts([f"{prefix}{e}.{name}.weight" for e in range(n_experts) for name in names], split, join)


@dataclass(frozen=True)
class Family:
    """One architecture of ours and the class of Transformers that computes the same.

    weights(config): {module or tensor of ours: their name, or Parts}; N is the number of the layer.
    keys: {their key: ours}. ours, theirs: what the family fixes in our configuration, and in theirs.
    needs: {what their class cannot do without: function of our configuration that tells if it is there}.
    """

    architecture: str
    class_name: str
    model_type: str
    weights: Callable
    keys: dict
    ours: dict = field(default_factory=dict)
    theirs: dict = field(default_factory=dict)
    needs: dict = field(default_factory=dict)
    yarn: dict = field(default_factory=dict)  # what their rope_scaling says beyond ours


# What all families have.
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "intermediate_size": "n_hidden",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "block_size",
    "rms_norm_eps": "norm_eps",
}
WEIGHTS = {
    "wte": "model.embed_tokens",
    "blocks.N.attn_norm": "model.layers.N.input_layernorm",
    "blocks.N.attn.proj": "model.layers.N.self_attn.o_proj",
    "blocks.N.mlp_norm": "model.layers.N.post_attention_layernorm",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
HEADS = {"num_key_value_heads": "n_kv_head", "head_dim": "head_dim"}
# What their keys mean when a config.json leaves them out; None: what it means to leave ours out.
DEFAULTS = {
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


def qkv(c):
    queries, keys = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    return stacked("model.layers.N.self_attn.", q_proj=queries, k_proj=keys, v_proj=keys)


def nano_weights(c):
    return WEIGHTS | {
        "blocks.N.attn.qkv": qkv(c),
        "blocks.N.attn.q_norm": "model.layers.N.self_attn.q_norm",
        "blocks.N.attn.k_norm": "model.layers.N.self_attn.k_norm",
        "blocks.N.mlp.gate_up": stacked("model.layers.N.mlp.", gate_proj=c.n_hidden, up_proj=c.n_hidden),
        "blocks.N.mlp.down": "model.layers.N.mlp.down_proj",
    }


def nanochat_weights(c):
    return WEIGHTS | {
        "blocks.N.attn.qkv": qkv(c),
        "blocks.N.mlp.up": "model.layers.N.mlp.fc1",
        "blocks.N.mlp.down": "model.layers.N.mlp.fc2",
    }


def deepseek_v3_weights(c):
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
        "blocks.N.mlp.gate_up": stacked(mlp, gate_proj=c.n_hidden, up_proj=c.n_hidden),
        "blocks.N.mlp.down": mlp + "down_proj",
        "blocks.N.mlp.gate": mlp + "gate",
        "blocks.N.mlp.experts.gate_up": experts(c.n_routed_experts, "gate_proj", "up_proj"),
        "blocks.N.mlp.experts.down": experts(c.n_routed_experts, "down_proj"),
        "blocks.N.mlp.shared.gate_up": stacked(mlp + "shared_experts.", gate_proj=n_shared, up_proj=n_shared),
        "blocks.N.mlp.shared.down": mlp + "shared_experts.down_proj",
        # The module of multi-token prediction is the layer behind the last one.
        "mtp.enorm": mtp + "enorm",
        "mtp.hnorm": mtp + "hnorm",
        "mtp.eh_proj": mtp + "eh_proj",
        "mtp.norm": mtp + "shared_head.norm",
    }


FAMILIES = (
    Family(
        "nano", "Qwen3ForCausalLM", "qwen3", nano_weights,
        KEYS | HEADS | {"tie_word_embeddings": "tie_embeddings"},
        ours={"qk_norm": True, "use_rope": True, "is_causal": True, "bias": False},
        theirs={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    ),
    Family(
        "nano", "LlamaForCausalLM", "llama", nano_weights,
        KEYS | HEADS
        | {"tie_word_embeddings": "tie_embeddings", "attention_bias": "bias", "mlp_bias": "bias"},
        ours={"qk_norm": False, "use_rope": True, "is_causal": True},
        theirs={"hidden_act": "silu"},
        needs={"an n_embd that n_head divides": lambda c: c.n_embd % c.n_head == 0},
    ),
    Family(
        "nanochat", "NanoChatForCausalLM", "nanochat", nanochat_weights,
        KEYS | HEADS,
        theirs={
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
        theirs={
            "hidden_act": "silu", "attention_bias": False, "rope_interleave": True, "moe_layer_freq": 1,
            "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        },
        needs={
            "a shared expert": lambda c: c.n_shared_experts,
            "groups of two experts or more": lambda c: c.n_routed_experts >= 2 * c.n_group,
        },
        yarn={"mscale": 1.0, "mscale_all_dim": 1.0},
    ),
)  # fmt: skip


# ---- the configuration -----------------------------------------------------------------------------


ROPE_SCALING = {
    "rope_scaling": (None,),
    "rope_scaling.rope_type": ("llama3", "yarn"),
    "rope_scaling.factor": ANY,
    "rope_scaling.original_max_position_embeddings": ANY,
    "rope_scaling.low_freq_factor": ANY,
    "rope_scaling.high_freq_factor": ANY,
    "rope_scaling.beta_fast": ANY,
    "rope_scaling.beta_slow": ANY,
}


def implemented(family):
    """What a class of Transformers can do of our configuration: see `common.config.unsupported`."""
    return {
        "architecture": (family.architecture,),
        "dropout": ANY,  # which is for training
        "rope_theta": ANY,
        **ROPE_SCALING,
        **dict.fromkeys(family.keys.values(), ANY),
        **{key: (value,) for key, value in family.ours.items()},
    }


def family_of(config):
    """The Family that computes what a model of ours does, or is nearest to that: see `why_not`."""

    def n_differing(family):
        return sum(getattr(config, key) != value for key, value in family.ours.items())

    families = [family for family in FAMILIES if family.architecture == config.architecture]
    return min(families, key=n_differing, default=None)


def why_not(config):
    """Why no class of Transformers computes what a model of ours does, or None."""
    if not (family := family_of(config)):
        known = sorted({family.architecture for family in FAMILIES})
        return f"{config.architecture} cannot be written for Transformers; {', '.join(known)} can"
    lacking = (what for what, is_there in family.needs.items() if not is_there(config))
    lacking = (f"a {family.class_name} needs {what}, and this model has none" for what in lacking)
    return unsupported(config, implemented(family), f"a {family.class_name}") or next(lacking, None)


def to_config(family, config):
    """What config.json says of the shape of a model of ours."""
    scaling = config.rope_scaling and config.rope_scaling.model_dump()
    if scaling and scaling["rope_type"] == "yarn":
        scaling |= family.yarn
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **{theirs: getattr(config, ours) for theirs, ours in family.keys.items()},
        **family.theirs,
        # New releases of Transformers read these two as well as old ones.
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }


# What a config.json says beside a network's shape.
NO_SHAPE = {
    "architectures", "model_type", "auto_map", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "initializer_range", "_name_or_path",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",  # see `from_config`
    "head_dim", "qk_head_dim", "sliding_window", "max_window_layers", "layer_types",  # follow from others
    "pretraining_tp", "ep_size", "seq_aux", "output_router_logits",  # how it was trained
}  # fmt: skip


def unread(family, found):
    """The keys of a config.json that `from_config` does not know, except those that are off."""
    known = NO_SHAPE | family.keys.keys() | family.theirs.keys()
    return sorted(key for key, value in found.items() if key not in known and value not in (None, False))


def from_config(found, source):
    """(Family, configuration of ours) of the content of a config.json; `source`: its name, for errors."""
    import models

    name = found.get("model_type")
    families = [family for family in FAMILIES if family.model_type == name]
    if not families:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise UserError(f"{source}: its model_type is {json.dumps(name)}; Nano reads {known}")
    family = families[0]
    for key, value in family.theirs.items():
        if found.get(key, value) != value:
            raise UserError(f"{source}: {key} is {json.dumps(found[key])}; Nano has only {json.dumps(value)}")
    values = {"architecture": family.architecture, **family.ours}
    for theirs, ours in family.keys.items():
        if found.get(theirs) is None and theirs not in DEFAULTS:
            raise UserError(f"{source}: {theirs} is missing")
        value = found.get(theirs, DEFAULTS.get(theirs))
        if value is not None and values.setdefault(ours, value) != value:
            raise UserError(f"{source}: {theirs} differs from what else is {ours} in Nano, and is one there")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: its rope_parameters are no JSON object")
    rope = {"rope_type" if key == "type" else key: rope[key] for key in rope if rope[key] is not None}
    values["rope_theta"] = rope.pop("rope_theta", found.get("rope_theta", 10000.0))
    share = rope.pop("partial_rotary_factor", found.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise UserError(f"{source}: partial_rotary_factor is {json.dumps(share)}; Nano has only 1.0")
    if rope.get("rope_type") == "yarn":
        for key, value in family.yarn.items():
            if rope.pop(key, None) != value:
                raise UserError(f"{source}: {key} of YaRN must be {json.dumps(value)}")
    values["rope_scaling"] = None if rope in ({}, {"rope_type": "default"}) else rope
    config = models.check_config(values, f"{source}, in Nano's names")
    return family, config.resolved(config.vocab_size)


# ---- the weights -----------------------------------------------------------------------------------


def counterparts(family, config, names):
    """Yield (name, Parts) of tensors of ours; the names within the Parts are whole."""
    table = family.weights(config)
    for name in names:
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        place = name.replace("mtp.block.", f"blocks.{config.n_layer}.")
        number = re.match(r"blocks\.(\d+)|", place)[1]
        place = re.sub(r"^blocks\.\d+", "blocks.N", place)
        module, _, kind = place.rpartition(".")
        found, suffix = (table[place], "") if place in table else (table.get(module), "." + kind)
        if not found:
            raise UserError(f"a {family.class_name} has no place for {name}, a part of this model")
        parts = found if isinstance(found, Parts) else Parts([found])
        theirs = [their.replace(".N.", f".{number}.") + suffix for their in parts.names]
        yield name, parts._replace(names=theirs)


def to_weights(family, config, state):
    """{name: tensor} as Transformers has them, of a state dictionary of ours."""
    weights = {}
    for name, parts in counterparts(family, config, state):
        weights.update(zip(parts.names, parts.split(state[name]), strict=True))
    return weights


def from_weights(family, config, read):
    """A state dictionary of ours. read: {name: a function that gives the tensor}, all that there is.

    UserError for a tensor that is missing, too much, or of another shape or kind than the configuration says.
    """
    import torch

    import models

    def require(name):
        if name not in read:
            raise UserError(f"the weights lack {name}, which config.json asks for")

    require(f"model.layers.{config.n_layer - 1}.self_attn.o_proj.weight")  # before so many layers are made
    with torch.device("meta"):
        shapes, expected = models.build(config).state_dict(), {}
    for name, parts in counterparts(family, config, shapes):
        for their in parts.names:
            require(their)
        expected.update(zip(parts.names, parts.split(shapes[name]), strict=True))
    if surplus := [name for name in read if name not in expected and not needless(name, config)]:
        raise UserError(f"the weights hold {min(surplus)}, for which config.json leaves no place")

    def tensor(name):
        found, shape = read[name](), expected[name].shape
        if found.shape != shape:
            raise UserError(f"{name} is {list(found.shape)}, and {list(shape)} by config.json")
        if found.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{name} is {found.dtype}; float32, bfloat16 or float16 are read")
        return found

    state = {
        name: parts.join([tensor(their) for their in parts.names]).contiguous()
        for name, parts in counterparts(family, config, shapes)
    }
    if config.tie_embeddings:
        state["lm_head.weight"] = state["wte.weight"]
    return state


def needless(name, config):
    """Whether it follows from the rest, or stands there twice."""
    return bool(
        name.endswith("rotary_emb.inv_freq")
        or (name == "lm_head.weight" and config.tie_embeddings)
        or re.fullmatch(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight", name)
    )
