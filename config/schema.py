"""Every key of the JSON files: type, range, default and meaning.

`ModelConfig` is config/model_config.json (other architectures define their own in models/), `TrainConfig` is
config/config_pretrain.json and those of the other stages, `DeepSpeedConfig` is config/deepspeed_config.json.
The classes validate the files (config/validation.py), fill in defaults, and generate doc/configuration.md
(engine/reference.py).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from typing_extensions import Self

LAST_STEP = 1 << 40  # so that step numbers times batch sizes fit in 64 bits
LEAST_SHARE = 1e-6  # of a part of a mixture
Auto = Literal["auto"]
Sequences = Annotated[int, Field(ge=1, le=1 << 20)]
Steps = Annotated[int, Field(ge=0, le=LAST_STEP)]
Rate = Annotated[float, Field(ge=0, le=10)]
PeakRate = Annotated[float, Field(gt=0, le=10)]
Number = TypeVar("Number", int, float)


def number(value: Number | Auto) -> Number:
    """The value of a key that may be "auto", once engine/scaling_laws.py has resolved it."""
    assert value != "auto"
    return value


class Schema(BaseModel):
    """A JSON object with known keys only, strict types (nothing is converted silently) and ranges."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @classmethod
    def renamed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values with the keys of earlier versions under today's names. Raises ValueError."""
        return dict(values)


class Llama3Rope(Schema):
    """rope_scaling of Llama 3.1: long wavelengths are stretched, short ones are kept."""

    rope_type: Literal["llama3"] = Field(description="stretch long wavelengths, as Llama 3.1 does")
    factor: float = Field(ge=1, le=1e6, description="how many times longer the long wavelengths become")
    original_max_position_embeddings: int = Field(
        ge=1, le=1 << 30, description="context of the pretraining, in tokens"
    )
    low_freq_factor: float = Field(
        1.0, gt=0, le=1e6, description="wavelengths that make fewer turns than this in the original context "
        "are stretched"
    )
    high_freq_factor: float = Field(
        4.0, gt=0, le=1e6, description="wavelengths that make more turns than this in the original context "
        "are kept; those in between are stretched in part"
    )

    @model_validator(mode="after")
    def _check_factors(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be below high_freq_factor")
        return self


class YarnRope(Schema):
    """rope_scaling of YaRN (Peng et al. 2023): similar to Llama 3.1's, and sharpens attention as well."""

    rope_type: Literal["yarn"] = Field(description="YaRN: stretch long wavelengths and sharpen attention")
    factor: float = Field(ge=1, le=1e6, description="how many times longer the context becomes")
    original_max_position_embeddings: int = Field(
        ge=1, le=1 << 30, description="context of the pretraining, in tokens"
    )
    beta_fast: float = Field(
        32.0, ge=1e-6, le=1e6, description="wavelengths that make more turns than this in the original "
        "context are kept"
    )
    beta_slow: float = Field(
        1.0, ge=1e-6, le=1e6, description="wavelengths that make fewer turns than this in the original "
        "context are stretched; those in between in part"
    )


class ArchitectureConfig(Schema):
    """The keys that all architectures share.

    A subclass adds the keys of its architecture, and fixes a key to one value with a ClassVar.
    """

    architecture: str = Field(description="which model to build: nano, or the name of a file in models/")
    block_size: int = Field(256, ge=1, le=1 << 20, description="context window, in tokens")
    vocab_size: int | None = Field(
        None, ge=1, le=1 << 24, description="number of token ids; null: that of the tokenizer"
    )
    n_layer: int = Field(4, ge=1, le=1024, description="depth: number of transformer blocks")
    n_head: int = Field(4, ge=1, le=1024, description="query heads per layer")
    n_embd: int = Field(256, ge=1, le=1 << 16, description="width: size of a token's vector")
    n_hidden: int | None = Field(
        None, ge=1, le=1 << 18,
        description="width inside the MLP; null: 8/3 n_embd, rounded up to a multiple of 32"
    )
    rope_theta: float = Field(10000.0, ge=1, le=1e15, description="base of the rotary wavelengths")
    rope_scaling: Annotated[Llama3Rope | YarnRope, Field(discriminator="rope_type")] | None = Field(
        None, description="how to stretch rotary positions to a context longer than in pretraining; null: not"
    )
    norm_eps: float = Field(1e-5, gt=0, lt=1, description="epsilon of RMSNorm, added to the mean square")
    tie_embeddings: bool = Field(True, description="the output head uses the weights of the token embedding")

    @model_validator(mode="after")
    def _check_scaling(self) -> Self:
        if self.rope_theta == 1 and self.rope_scaling and self.rope_scaling.rope_type == "yarn":
            raise ValueError("rope_scaling yarn needs different wavelengths: set rope_theta above 1")
        return self

    def resolved(self, vocab_size: int | None) -> Self:
        """A copy in which every null is replaced by the value it stands for. vocab_size: the tokenizer's."""
        return self.model_copy(update={"vocab_size": self.vocab_size or vocab_size, **self.implied()})

    def implied(self) -> dict[str, int]:
        """{key: its value, or what its null stands for}"""
        return {"n_hidden": self.n_hidden or -(-8 * self.n_embd // (3 * 32)) * 32}


class ModelConfig(ArchitectureConfig):
    """config/model_config.json: the shape of the network in model.py."""

    architecture: Literal["nano"] = Field("nano", description="which model to build")
    n_kv_head: int | None = Field(
        None, ge=1, le=1024, description="key/value heads per layer, a divisor of n_head; null: n_head"
    )
    head_dim: int | None = Field(None, ge=1, le=4096, description="width of one head; null: n_embd / n_head")
    bias: bool = Field(False, description="linear layers have a bias")
    use_rope: bool = Field(True, description="rotary position embeddings (RoPE); false: learned ones")
    is_causal: bool = Field(True, description="each token sees only the tokens before it; false: all tokens")
    qk_norm: bool = Field(True, description="apply RMSNorm to the queries and keys of each head")

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; "
                f"change one of them or set head_dim"
            )
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        if self.use_rope and self.implied()["head_dim"] % 2:
            raise ValueError(f"rotary positions need an even head_dim, found {self.implied()['head_dim']}")
        if self.rope_scaling and not self.use_rope:
            raise ValueError("rope_scaling is for rotary positions, but use_rope is false")
        return self

    def implied(self) -> dict[str, int]:
        return {
            "n_kv_head": self.n_kv_head or self.n_head,
            "head_dim": self.head_dim or self.n_embd // self.n_head,
            **super().implied(),
        }


class MixturePart(Schema):
    """One part of a dataset_path that is a mixture."""

    path: tuple[str, str] | None = Field(None, description="[train, validation]: a pair of token files")
    task: str | None = Field(
        None, description='or instead a task and its options: a name in tasks/, as in "arithmetic:digits=2"'
    )
    weight: float = Field(1.0, gt=0, le=1e9, description="its share of the sequences, relative to the others")

    @property
    def names(self) -> tuple[str, str]:
        """What is trained on and what is validated with: the paths, or twice the task."""
        return self.path or (self.task or "", self.task or "")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.path is None) == (self.task is None):
            raise ValueError("a part of a mixture has either a path or a task")
        return self


DataPart = Annotated[
    Annotated[tuple[str, str], Tag("pair")] | Annotated[MixturePart, Tag("part")],
    Discriminator(lambda value: "part" if isinstance(value, dict | MixturePart) else "pair"),
]


class TrainConfig(Schema):
    """config/config_pretrain.json, config_mid.json, config_sft.json: one training run."""

    from_checkpoint: str = Field(
        "", description='checkpoint whose weights a new run starts from; "auto": the newest model of '
        'the stages before it; "": random weights'
    )
    dataset_path: list[DataPart] = Field(
        description="[[train, validation], ...] pairs of token files; several form a curriculum, in order; "
        'or a mixture: [{"path": [train, validation], "weight": 3}, {"task": "NAME", "weight": 1}, ...]',
    )
    tokenizer_path: str = Field(
        "dataset/prepared/tokenizer.json",
        description="tokenizer of the data: a tokenizer.json, a checkpoint or a Hugging Face model folder",
    )
    random_seed: int = Field(1337, ge=0, lt=1 << 63, description="seed of weights, data order and dropout")
    batch_size: Sequences | Auto = Field(
        32, description='sequences per forward pass; "auto": for a global batch of 0.58 D^0.571 tokens, '
        "where D is 20 tokens per parameter (Li et al. 2025)"
    )
    gradient_accumulation_steps: Sequences | Auto = Field(
        1, description="forward passes per optimizer step; the global batch is batch_size times this; "
        '"auto": as few as memory allows'
    )
    max_steps: Steps | Auto = Field(
        0, description='total optimizer steps; 0: until stopped; "auto": enough for 20 tokens per parameter'
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability in training")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw; muon: Muon for the weight matrices of the blocks, AdamW for the rest"
    )
    learning_rate: PeakRate | Auto = Field(
        6e-4, description='peak learning rate; "auto": 1.79 N^-0.713 D^0.307, at most 0.01, for N parameters '
        "and D = 20 N tokens (Li et al. 2025)"
    )
    matrix_lr: float | None = Field(
        None, gt=0, le=10, description="Muon: peak learning rate of its matrices; null: 0.02"
    )
    embedding_lr: float | None = Field(
        None, gt=0, le=10, description="peak learning rate of the embeddings; null: learning_rate"
    )
    unembedding_lr: float | None = Field(
        None, gt=0, le=10, description="peak learning rate of an untied output head; null: learning_rate"
    )
    momentum: float | None = Field(
        None, gt=0, lt=1, description="Muon: momentum of its matrices; null: 0.95"
    )
    weight_decay: float = Field(0.1, ge=0, le=10, description="decoupled weight decay of all matrices")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the running mean of the gradient")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW: the same for the squared gradient")
    decay_lr: bool = Field(True, description="warm up, then decay the learning rate; false: constant")
    warmup_iters: Steps | Auto = Field(
        300, description='steps of linear warm-up; "auto": 5 % of the steps'
    )
    warmup_ratio: float | None = Field(
        None, ge=0, lt=1, description="warm-up as a fraction of lr_decay_iters; null: use warmup_iters"
    )
    warmdown_ratio: float | None = Field(
        None, gt=0, le=1, description="the learning rate stays constant and falls linearly to min_lr in this "
        "last fraction of lr_decay_iters; null: cosine decay after the warm-up"
    )
    lr_decay_iters: int = Field(0, ge=0, description="step at which min_lr is reached; 0: max_steps")
    min_lr: Rate | Auto = Field(
        6e-5, description='final learning rate; "auto": learning_rate / 10'
    )
    grad_clip: float = Field(1.0, ge=0, description="clip the norm of the gradient to this; 0: no clipping")
    eval_interval: int = Field(100, ge=1, description="steps between validations")
    eval_iters: int = Field(
        5, ge=1, description="batches per validation, shared among several files by their size (each gets at "
        "least one)"
    )
    eval_tasks: list[str] = Field(
        [], description='tasks to test the model on while it trains: names in tasks/ with options, as in '
        '"arithmetic:digits=2", or .jsonl files of questions'
    )
    eval_tasks_interval: int = Field(
        1000, ge=1, description="steps between tests on eval_tasks, and between texts for sample_prompts"
    )
    eval_tasks_examples: int = Field(
        200, ge=1, le=1 << 20, description="at most so many test examples of each of eval_tasks"
    )
    sample_prompts: list[str] = Field(
        [], description="texts that the model continues (in SFT: answers) every eval_tasks_interval steps, "
        "for the log"
    )
    log_interval: int = Field(1, ge=1, description="steps between log lines")
    save_interval: int = Field(1000, ge=1, description="steps between regular checkpoints")
    keep_checkpoints: int = Field(
        3, ge=0, description="how many of the newest checkpoints of a run to keep, besides the best; 0: all"
    )
    backend: Literal["auto", "nccl", "gloo"] = Field(
        "auto", description='communication of several processes; "auto": nccl on GPUs, else gloo'
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$",
        description='where to train; "auto": the first usable GPU, else the CPU'
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description='precision of products; "auto": the fastest that is safe, measured where needed'
    )
    sdp_kernel: Literal["auto", "flash", "mem_efficient", "math"] = Field(
        "auto", description='kernel of scaled dot-product attention; "auto": the fastest for device and dtype'
    )
    use_amp: bool = Field(
        True, description="mixed precision: float32 weights, products in dtype; false: weights in dtype, too"
    )
    compile: bool = Field(
        False, description="use torch.compile: about a minute at the start, then faster; needs a C++ compiler"
    )
    tracker: Literal["tensorboard", "wandb", "trackio", "swanlab"] | None = Field(
        None, description="where the numbers also go: TensorBoard (runs/train_<run>), Weights & Biases, "
        "trackio or SwanLab; null: only into the log"
    )

    @classmethod
    def renamed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """TensorBoard used to be the only tracker, and had a key of its own."""
        values = dict(values)
        used = values.pop("tensorboard", None)
        if used not in (None, True, False):
            raise ValueError(f'key "tensorboard": found {used!r}; it is "tracker" now: "tensorboard" or null')
        if used:
            if values.get("tracker") not in (None, "tensorboard"):
                raise ValueError('key "tensorboard" is an older name of "tracker": "tensorboard"; remove it')
            values["tracker"] = "tensorboard"
        return values

    @property
    def automatic(self) -> list[str]:
        """The keys set to "auto" that engine/scaling_laws.py turns into numbers."""
        keys = ("batch_size", "gradient_accumulation_steps", "max_steps", "learning_rate", "min_lr")
        return [key for key in (*keys, "warmup_iters") if getattr(self, key) == "auto"]

    @property
    def mixture(self) -> list[MixturePart]:
        """The parts of the mixture; none if the data are a curriculum."""
        return [part for part in self.dataset_path if isinstance(part, MixturePart)]

    @property
    def data_names(self) -> list[tuple[str, str]]:
        """(training, validation) of each part of dataset_path: the paths, or twice the task."""
        return [part.names if isinstance(part, MixturePart) else part for part in self.dataset_path]

    @model_validator(mode="after")
    def _check_mixture(self) -> Self:
        if self.mixture and len(self.mixture) < len(self.dataset_path):
            raise ValueError(
                "dataset_path holds both [train, validation] pairs and parts of a mixture; write each pair "
                'as {"path": [train, validation], "weight": 1}'
            )
        total = sum(part.weight for part in self.mixture)
        least = min((part.weight for part in self.mixture), default=total)
        if least < LEAST_SHARE * total:
            raise ValueError(
                f"dataset_path: weight {least:g} is less than a millionth of all weights together; "
                f"give it {2 * LEAST_SHARE * total:.1g} or more"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.automatic:  # checked again once they are numbers
            return self
        warmup_iters, end = number(self.warmup_iters), self.lr_decay_iters or number(self.max_steps)
        if self.decay_lr and not end:
            raise ValueError(
                "decay_lr needs an end: set lr_decay_iters or max_steps, or set decay_lr to false"
            )
        if self.decay_lr and self.warmup_ratio is None and warmup_iters >= end:
            raise ValueError(f"warmup_iters={warmup_iters} must be below the end of the decay, {end}")
        if not self.decay_lr and (self.warmup_ratio or self.warmdown_ratio):
            raise ValueError("warmup_ratio and warmdown_ratio need decay_lr, but decay_lr is false")
        warmup = warmup_iters if self.warmup_ratio is None else self.warmup_ratio * end
        if self.warmdown_ratio and warmup + self.warmdown_ratio * end > end * (1 + 1e-9):
            raise ValueError(
                f"warmdown_ratio={self.warmdown_ratio} of {end} steps begins before the warm-up of "
                f"{warmup:g} steps ends; lower one of them"
            )
        if number(self.min_lr) > number(self.learning_rate):
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}")
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        for key in ("matrix_lr", "momentum"):
            if self.optimizer != "muon" and getattr(self, key) is not None:
                raise ValueError(f'{key} is for optimizer "muon", but optimizer is "{self.optimizer}"')
        return self


class DeepSpeedConfig(Schema):
    """config/deepspeed_config.json: DeepSpeed's own file, without what TrainConfig already says."""

    train_batch_size: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description='global batch size; "auto": batch_size x gradient_accumulation_steps of the run'
    )
    train_micro_batch_size_per_gpu: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description='sequences per forward pass; "auto": as many as batch_size allows'
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description='forward passes per step of one process; "auto": what the two keys above leave'
    )
    gradient_clipping: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto", description='clip the norm of the gradient to this; "auto": grad_clip of the run'
    )
    zero_optimization: dict[str, Any] = Field(
        description="stage (0 to 3), offload_optimizer, offload_param, ...: see DeepSpeed's documentation"
    )

    @model_validator(mode="before")
    @classmethod
    def _reject_keys_of_the_run(cls, values: dict[str, Any]) -> dict[str, Any]:
        elsewhere = {"optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast"} & values.keys()
        if elsewhere:
            raise ValueError(
                f"optimizer, schedule and precision are set in the run's configuration, and only there; "
                f"remove {', '.join(sorted(elsewhere))}"
            )
        return values


Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Share = Annotated[float, Field(ge=0, le=1)]


class ProblemResult(Schema):
    """A line of checkpoint/results.jsonl, which `python problem.py --results` prints as a table."""

    model_config = ConfigDict(extra="ignore")

    time: str = Field(pattern=r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d$")
    problem: str = Field(pattern=r"^\w{1,40}$")
    sizes: dict[str, Count]
    parameters: Count
    steps: Count
    seconds: Annotated[float, Field(ge=0, lt=1e12)] | None
    accuracy: Share
    base_rate: Share = Field(alias="base rate")
    seed: Count
