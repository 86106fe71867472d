"""Every format refuses a model if any key of its configuration has a value that it does not implement."""

import functools
import json

import pytest
from pydantic import create_model
from test_gguf import LATENT
from test_huggingface import LLAMA3, MIXTURE, SMALL, YARN

import formats
import models
from config.validation import ANY
from formats import gguf, llama2c
from formats.families import find_family, implemented

LLAMA, QWEN3 = SMALL | dict(qk_norm=False), SMALL | dict(qk_norm=True)
# Each class of Transformers, each architecture of llama.cpp, and llama2.c: a model that it supports.
CASES = {
    "huggingface, Llama": ("huggingface", LLAMA),
    "huggingface, Qwen3": ("huggingface", QWEN3),
    "huggingface, nanochat": ("huggingface", SMALL | dict(architecture="nanochat")),
    "huggingface, DeepSeek V3": ("huggingface", MIXTURE),
    "gguf, llama": ("gguf", LLAMA),
    "gguf, qwen3": ("gguf", QWEN3),
    "gguf, deepseek2": ("gguf", LATENT),
    "llama2c": ("llama2c", LLAMA),
}


@functools.cache
def config_of(case):
    return models.check_config(CASES[case][1], "the test").resolved(50)


def whitelist_of(case):
    name, config = CASES[case][0], config_of(case)
    if name == "huggingface":
        return implemented(find_family(config))
    return llama2c.IMPLEMENTED if name == "llama2c" else gguf.IMPLEMENTED[gguf.gguf_architecture(config)]


def as_json(value):
    return json.dumps(value, ensure_ascii=False)


def reason_of(case, config):
    return formats.get(CASES[case][0]).unsupported_reason(config)


def test_all_formats_are_tested():
    assert {name for name, _ in CASES.values()} == set(formats.names())


@pytest.mark.parametrize("case", CASES)
def test_a_supported_model(case):
    config = config_of(case)
    assert reason_of(case, config) is None
    assert {key for key, _ in config} <= whitelist_of(case).keys()


VALUES = (None, False, True, 2, 0.25, "", "relu²", [1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_an_unknown_key_is_refused_whatever_its_value(case, value):
    config = config_of(case)
    extended = create_model("Extended", __base__=type(config), activation=(type(value), value))
    reason = reason_of(case, extended.model_construct(**dict(config), activation=value))
    assert reason.startswith(f"activation is {as_json(value)} in this model, but ")
    assert " does not know this key" in reason


RESTRICTED = [
    (case, key) for case in CASES for key, allowed in whitelist_of(case).items()
    if allowed is not ANY and key in type(config_of(case)).model_fields and key != "rope_scaling"
]  # fmt: skip


@pytest.mark.parametrize(("case", "key"), RESTRICTED)
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_outside_of_the_whitelist_is_refused(case, key, value):
    name, config = CASES[case][0], config_of(case)
    changed = config.model_copy(update={key: value})
    reason = reason_of(case, changed)
    if key == "qk_norm" and name != "llama2c":
        # Llama and Qwen3 differ in this key: a model may be supported as the other one.
        assert reason is None if value in (False, True) else f"qk_norm is {as_json(value)} in" in reason
    elif value in whitelist_of(case)[key]:
        assert reason is None
    else:
        assert f"{key} is {as_json(value)} in" in reason or (key == "architecture" and str(value) in reason)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scaling", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_rope_scaling_is_checked_inside(case, scaling):
    """Every kind that is not in the whitelist is refused, and so is an unknown key of the object."""
    if CASES[case][1].get("architecture") == "deepseek_v3" and scaling == LLAMA3:
        pytest.skip("the architecture has no such scaling")
    config = models.check_config(CASES[case][1] | dict(rope_scaling=scaling), "the test").resolved(50)
    allowed = whitelist_of(case)
    reason = reason_of(case, config)
    if scaling["rope_type"] in allowed.get("rope_scaling.rope_type", ()):
        assert reason is None
        rope = config.rope_scaling
        extended = create_model("Extended", __base__=type(rope), ntk_alpha=(float, 2.0))
        rope = extended.model_construct(**dict(rope), ntk_alpha=2.0)
        reason = reason_of(case, config.model_copy(update={"rope_scaling": rope}))
        assert reason.startswith("rope_scaling.ntk_alpha is 2.0 in this model, but ")
    else:
        assert f'"{scaling["rope_type"]}" in this model, but ' in reason
