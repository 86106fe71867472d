"""evaluation/harness.py against the Hugging Face backend of lm-evaluation-harness, on the exported model."""

import contextlib
import functools
import json
from pathlib import Path

import pytest
import torch

import models
from common.errors import UserError
from engine.checkpoint import Checkpoint
from evaluation import sandbox
from formats import huggingface
from tokenizer import BPETokenizer, CharTokenizer

lm_eval = pytest.importorskip("lm_eval")
harness = pytest.importorskip("evaluation.harness")

TASKS = Path(__file__).parent / "harness_tasks"
KINDS = ["choices", "letters", "cloze", "generation", "rolling", "code"]
TEXT = (
    "The red owl in the old house is white, a dog and a cat in town; 12 + 7 = 19, 3 + 5 = 8\n"
    "def f(x): return x + 1\nAnswer: A B C D or green, blue and yellow horses? black-like mouse, whale.\n"
)
SHAPES = {
    "nano": dict(),
    "llama3": dict(qk_norm=False, n_kv_head=1, tie_embeddings=False, rope_scaling=dict(
        rope_type="llama3", factor=4.0, original_max_position_embeddings=32)),
    "nanochat": dict(architecture="nanochat"),
    "deepseek_v3": dict(architecture="deepseek_v3", n_routed_experts=8, qk_nope_head_dim=8,
                        qk_rope_head_dim=8, v_head_dim=12, kv_lora_rank=16),
}  # fmt: skip


def make(name="nano", kind="char", block_size=160, scale=0.05):
    """(model, tokenizer); scale: of random numbers added to the weights."""
    tokenizer = CharTokenizer.train([TEXT]) if kind == "char" else BPETokenizer.train([TEXT] * 2, 320)
    shape = dict(block_size=block_size, n_layer=2, n_head=2, n_embd=32, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(1)
    model = models.build(models.check_config(shape | SHAPES[name], "the test")).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=scale)
    return model, tokenizer


def both(tmp_path, model, tokenizer, chat=False, kinds=KINDS, **options):
    """The results of the harness, with Nano's model and with the exported one, in float64."""
    from lm_eval.models.huggingface import HFLM

    checkpoint = Checkpoint(
        "pretrain", "20000101_000000", 0, model.config.model_dump(), {}, tokenizer.to_dict(),
        model.state_dict(), optimizer={},
    )  # fmt: skip
    with contextlib.redirect_stdout(None):
        huggingface.write(checkpoint, "the test", tmp_path / "exported")
    theirs = HFLM(
        pretrained=str(tmp_path / "exported"),
        dtype="float64",
        device="cpu",
        batch_size=5,
        experts_implementation="eager",
        **options,
    )
    ours = harness.NanoLM(model.double(), tokenizer, chat)
    share_positions(model, theirs.model)
    norms_in_float64(theirs.model)
    results = []
    for lm in (ours, theirs):
        with harness.code_eval():
            found = harness.find([f"made_up_{kind}" for kind in kinds], TASKS)
            tasks = {task.task_name: task for _, own in found.values() for task in own}
            for task in tasks.values():
                task.set_fewshot_seed(seed=1234)
            results.append(
                lm_eval.evaluate(
                    lm,
                    {"tasks": tasks, "groups": {}, "group_map": {}},
                    bootstrap_iters=0,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    confirm_run_unsafe_code=True,
                )  # fmt: skip
            )
    return results


def share_positions(model, other):
    """Both compute their tables of rotary positions in float32, whatever the dtype of the model, and round
    differently on the way."""
    positions = torch.arange(model.config.block_size)[None]
    cos, sin = (table[0].chunk(2, -1)[0] for table in other.model.rotary_emb(model.wte.weight, positions))
    sin = -sin if model.config.architecture == "nanochat" else sin
    assert max((model.rotary_cos - cos).abs().max(), (model.rotary_sin - sin).abs().max()) < 1e-4
    model.rotary_cos, model.rotary_sin = cos.contiguous(), sin.contiguous()


def norms_in_float64(other):
    """Transformers computes RMSNorm in float32, whatever the dtype of the model."""

    def forward(norm, x):
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return x * norm.weight if hasattr(norm, "weight") else x

    norms = [module for module in other.modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms
    for norm in norms:
        norm.forward = functools.partial(forward, norm)


def check(results, tolerance=1e-6):
    """Log-likelihoods differ by no more than the tolerance, all else by nothing. Returns by how much."""
    ours, theirs = results
    largest = 0.0
    for name, samples in ours["samples"].items():
        for sample, other in zip(samples, theirs["samples"][name], strict=True):
            assert sample["arguments"] == other["arguments"]
            for one, two in zip(flat(sample["resps"]), flat(other["resps"]), strict=True):
                if isinstance(one, float):
                    largest = max(largest, abs(one - two))
                    assert one == pytest.approx(two, abs=tolerance, rel=0)
                else:
                    assert one == two
            for metric in sample["metrics"]:
                if "perplexity" not in metric and metric != "bits_per_byte":
                    assert sample[metric] == other[metric]
        for key, value in ours["results"][name].items():
            assert value == (pytest.approx(theirs["results"][name][key]) if type(value) is float else value)
    return largest


def flat(value):
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in flat(item)]
    return [value]


def record(request, figure):
    """Print a figure with the test's output (pytest -s)."""
    print(f"{request.node.name}: log-likelihoods differ by at most {figure:.1e}")


CASES = [(name, kind) for name in SHAPES for kind in ("char", "bpe")]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case != ("nano", "bpe")]


@pytest.mark.parametrize("name, kind", [("nano", "bpe"), *SLOW])
def test_numbers_are_those_of_the_hugging_face_backend(tmp_path, request, name, kind):
    model, tokenizer = make(name, kind)
    record(request, check(both(tmp_path / "1", model, tokenizer, kinds=["choices", "letters", "cloze"])))
    # With larger weights, texts differ and end at different places.
    results = both(tmp_path / "2", *make(name, kind, scale=0.4), kinds=["generation", "code"])
    check(results)
    answers = [flat(sample["resps"])[0] for sample in results[0]["samples"]["made_up_generation"]]
    assert len({*answers}) > 3 and len({*map(len, answers)}) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_numbers_without_bos_and_in_the_chat_template(tmp_path, request, name, kind):
    """Where the module differs from the Hugging Face backend, it is as that without <|bos|>."""
    model, tokenizer = make(name, kind, block_size=48)  # texts are longer than the context, too
    first = check(both(tmp_path / "1", model, tokenizer, kinds=["rolling"], add_bos_token=False))
    model, tokenizer = make(name, kind, block_size=400)
    options = dict(chat=True, kinds=["choices", "letters", "generation"], add_bos_token=False)
    record(request, max(first, check(both(tmp_path / "2", model, tokenizer, **options))))


@pytest.mark.slow
def test_long_prompts_are_shortened_as_there(tmp_path):
    check(both(tmp_path, *make("nano", "char", block_size=64), kinds=["choices", "cloze", "generation"]))


def test_humaneval_runs_programs_in_the_sandbox_without_a_download(tmp_path, monkeypatch):
    """The harness's own files for it, with problems of ours."""
    problem = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(g):\n    assert g(2) == 4\n"}
    lines = [json.dumps({**problem, "task_id": str(number)}) for number in range(3)]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines), "utf-8")
    theirs = Path(lm_eval.__file__).parent / "tasks" / "humaneval" / "humaneval.yaml"
    (tmp_path / "mine.yaml").write_text(
        f"include: {theirs}\ntask: my_humaneval\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'problems.jsonl'}\n", "utf-8"
    )  # fmt: skip
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    written = ["    return x * x", "    return x * 3", "    while True: pass"]
    monkeypatch.setattr(harness.NanoLM, "generate_until", lambda self, requests: written)
    monkeypatch.setattr(sandbox.run_code, "__defaults__", (1, sandbox.MEMORY))
    options = dict(include_path=tmp_path, run_generated_code=True)
    [result] = harness.run(*make(), ["my_humaneval"], **options)["my_humaneval"]
    assert [score.value for score in result.scores] == [1, 0, 0] and result.metric.startswith("pass@1")
    assert result.scores[1].answer == "def f(x):\n    return x * 3"


@pytest.mark.slow
def test_names_that_the_harness_does_not_know_are_told_near_ones():
    """It reads all its files for that."""
    with pytest.raises(UserError, match="did you mean .*made_up_choices"):
        harness.run(*make(), ["made_up_choice"], include_path=TASKS)
    with pytest.raises(UserError, match="arc_easy could not be loaded .* downloads the data"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_HOME", "/nowhere")
            patch.setattr(harness, "is_online", lambda: False)
            harness.run(*make(), ["arc_easy"])
