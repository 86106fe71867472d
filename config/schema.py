"""The keys of the JSON files: their types, ranges, defaults and meaning, each in one place.

`ModelConfig` is config/model_config.json (other architectures have theirs in models/), `TrainConfig` is
config/config_pretrain.json and config/config_sft.json, `DeepSpeedConfig` is config/deepspeed_config.json.
The same classes check what a user wrote (common/config.py), fill in defaults, and yield the reference
page doc/configuration.md.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LAST_STEP = 1 << 40  # so that all that is counted in steps fits in 64 bits
Auto = Literal["auto"]


class Schema(BaseModel):
    """A JSON object in which every key is known, typed, bounded and never silently converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Llama3Rope(Schema):
    """rope_scaling of Llama 3.1: long wavelengths are stretched, short ones are kept."""

    rope_type: Literal["llama3"] = Field(description="long wavelengths are stretched, as in Llama 3.1")
    factor: float = Field(ge=1, le=1e6, description="how many times longer the long wavelengths become")
    original_max_position_embeddings: int = Field(
        ge=1, le=1 << 30, description="context of the pretraining, in tokens"
    )
    low_freq_factor: float = Field(
        1.0, gt=0, le=1e6, description="wavelengths that turn less often in that context are stretched"
    )
    high_freq_factor: float = Field(
        4.0, gt=0, le=1e6, description="wavelengths that turn more often in it are kept"
    )

    @model_validator(mode="after")
    def _factors_fit(self):
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be below high_freq_factor")
        return self


class YarnRope(Schema):
    """rope_scaling of YaRN (Peng et al. 2023): much the same, and attention is sharpened."""

    rope_type: Literal["yarn"] = Field(description="much the same, and attention is sharpened: YaRN")
    factor: float = Field(ge=1, le=1e6, description="how many times longer the context becomes")
    original_max_position_embeddings: int = Field(
        ge=1, le=1 << 30, description="context of the pretraining, in tokens"
    )
    beta_fast: float = Field(
        32.0, ge=1e-6, le=1e6, description="wavelengths that turn more often in that context are kept"
    )
    beta_slow: float = Field(
        1.0, ge=1e-6, le=1e6, description="wavelengths that turn less often in it are stretched"
    )


class ArchitectureConfig(Schema):
    """What every architecture has. Its own keys, and what it fixes (a ClassVar), are in its own class."""

    architecture: str = Field(description="which model to build: nano, or a file of models/")
    block_size: int = Field(256, ge=1, le=1 << 20, description="context window, in tokens")
    vocab_size: int | None = Field(None, ge=1, le=1 << 24, description="null: taken from the tokenizer")
    n_layer: int = Field(4, ge=1, le=1024, description="depth: number of transformer blocks")
    n_head: int = Field(4, ge=1, le=1024, description="query heads per layer")
    n_embd: int = Field(256, ge=1, le=1 << 16, description="width: size of a token's vector")
    n_hidden: int | None = Field(
        None, ge=1, le=1 << 18, description="width inside the MLP; null: 8/3 n_embd, rounded up to 32"
    )
    rope_theta: float = Field(10000.0, ge=1, le=1e15, description="base of the rotary wavelengths")
    rope_scaling: Annotated[Llama3Rope | YarnRope, Field(discriminator="rope_type")] | None = Field(
        None, description="for a context longer than that of the pretraining; null: none"
    )
    norm_eps: float = Field(1e-5, gt=0, lt=1, description="added to the mean square in RMSNorm")
    tie_embeddings: bool = Field(True, description="the output head shares the embedding's matrix")

    @model_validator(mode="after")
    def _scaling_fits(self):
        if self.rope_theta == 1 and self.rope_scaling and self.rope_scaling.rope_type == "yarn":
            raise ValueError("rope_scaling yarn tells wavelengths apart: set rope_theta above 1")
        return self

    def resolved(self, vocab_size):
        """The same shape with nothing left open: every null replaced by what it stands for."""
        return self.model_copy(update={"vocab_size": self.vocab_size or vocab_size, **self.implied()})

    def implied(self):
        """{key: what its null stands for}"""
        return {"n_hidden": self.n_hidden or -(-8 * self.n_embd // (3 * 32)) * 32}


class ModelConfig(ArchitectureConfig):
    """config/model_config.json: the shape of the network of model.py."""

    architecture: Literal["nano"] = Field("nano", description="which model to build")
    n_kv_head: int | None = Field(
        None, ge=1, le=1024, description="key/value heads per layer; must divide n_head; null: n_head"
    )
    head_dim: int | None = Field(None, ge=1, le=4096, description="size of one head; null: n_embd / n_head")
    bias: bool = Field(False, description="give the linear layers a bias")
    use_rope: bool = Field(True, description="rotary positions; false: learned positions")
    is_causal: bool = Field(True, description="a token sees only those before it; false: all of them")
    qk_norm: bool = Field(True, description="RMSNorm on queries and keys, per head")

    @model_validator(mode="after")
    def _shapes_fit(self):
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
            raise ValueError("rope_scaling is for rotary positions, and use_rope is false")
        return self

    def implied(self):
        return {
            "n_kv_head": self.n_kv_head or self.n_head,
            "head_dim": self.head_dim or self.n_embd // self.n_head,
            **super().implied(),
        }


class TrainConfig(Schema):
    """config/config_pretrain.json and config/config_sft.json: one training run."""

    from_checkpoint: str = Field(
        "", description='a new run starts from the weights of this model; "auto": of the newest pretrained '
        'one; "": from nothing'
    )
    dataset_path: list[tuple[str, str]] = Field(
        description="[[train, validation], ...] token files: a curriculum, trained in order",
    )
    tokenizer_path: str = Field(
        "dataset/prepared/tokenizer.json",
        description="the data's tokenizer: a tokenizer.json, a checkpoint, or a folder of Transformers'",
    )
    random_seed: int = Field(1337, ge=0, lt=1 << 63, description="seed of weights, data order and dropout")
    batch_size: Annotated[int, Field(ge=1, le=1 << 20)] | Auto = Field(
        32, description='sequences in one forward pass; "auto": a global batch of 0.58 D^0.571 tokens, where '
        "D is 20 per parameter of the model (Li et al. 2025)"
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1 << 20)] | Auto = Field(
        1, description="forward passes per step; times batch_size is the global batch; "
        '"auto": as few as fit in memory'
    )
    max_steps: Annotated[int, Field(ge=0, le=LAST_STEP)] | Auto = Field(
        0, description='optimizer steps in all; 0: until stopped; "auto": 20 tokens per parameter'
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="how gradients become steps; muon: those of the blocks' matrices, adamw the rest"
    )
    learning_rate: Annotated[float, Field(gt=0, le=10)] | Auto = Field(
        6e-4, description='peak learning rate; "auto": 1.79 N^-0.713 D^0.307, at most 0.01, for N parameters '
        "and D = 20 N (Li et al. 2025)"
    )
    matrix_lr: float | None = Field(
        None, gt=0, le=10, description="muon: peak learning rate of its matrices; null: 0.02"
    )
    embedding_lr: float | None = Field(
        None, gt=0, le=10, description="peak learning rate of the embeddings; null: learning_rate"
    )
    unembedding_lr: float | None = Field(
        None, gt=0, le=10, description="peak learning rate of an untied head; null: learning_rate"
    )
    momentum: float | None = Field(
        None, gt=0, lt=1, description="muon: decay of the mean gradient of its matrices; null: 0.95"
    )
    weight_decay: float = Field(0.1, ge=0, le=10, description="decoupled decay of all matrices")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the mean gradient")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW: decay of the mean squared gradient")
    decay_lr: bool = Field(True, description="warm up, then decay; false: constant")
    warmup_iters: Annotated[int, Field(ge=0)] | Auto = Field(
        300, description='steps of linear warm-up; "auto": a twentieth of the steps'
    )
    warmup_ratio: float | None = Field(
        None, ge=0, lt=1, description="the same as a share of lr_decay_iters; null: warmup_iters counts"
    )
    warmdown_ratio: float | None = Field(
        None, gt=0, le=1, description="share of lr_decay_iters in which a constant rate falls linearly to "
        "min_lr at the end; null: a cosine from the warm-up on"
    )
    lr_decay_iters: int = Field(0, ge=0, description="step at which min_lr is reached; 0: max_steps")
    min_lr: Annotated[float, Field(ge=0, le=10)] | Auto = Field(
        6e-5, description='final learning rate; "auto": a tenth of learning_rate'
    )
    grad_clip: float = Field(1.0, ge=0, description="largest gradient norm; 0: unlimited")
    eval_interval: int = Field(100, ge=1, description="steps between validations")
    eval_iters: int = Field(
        5, ge=1, description="batches per validation; of several files each has its share, one at least"
    )
    log_interval: int = Field(1, ge=1, description="steps between log lines")
    save_interval: int = Field(1000, ge=1, description="steps between checkpoints that are always written")
    keep_checkpoints: int = Field(
        3, ge=0, description="how many of a run's newest checkpoints are kept, besides the best; 0: all"
    )
    backend: Literal["auto", "nccl", "gloo"] = Field("auto", description="communication of several processes")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$", description="auto, cpu, mps, cuda or cuda:N"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description='precision; "auto": the fastest that is safe, measured where that is not obvious'
    )
    sdp_kernel: Literal["auto", "flash", "mem_efficient", "math"] = Field(
        "auto", description="kernel of scaled dot-product attention"
    )
    use_amp: bool = Field(
        True, description="mixed precision: float32 weights, products in dtype; false: weights in dtype"
    )
    compile: bool = Field(
        False, description="torch.compile the step: a minute at the start, faster then; needs a C++ compiler"
    )
    tensorboard: bool = Field(False, description="write runs/train_<run> for TensorBoard, besides the log")

    @property
    def automatic(self):
        """The keys whose "auto" stands for a number that follows from the model: engine/scaling_laws.py."""
        keys = ("batch_size", "gradient_accumulation_steps", "max_steps", "learning_rate", "min_lr")
        return [key for key in (*keys, "warmup_iters") if getattr(self, key) == "auto"]

    @model_validator(mode="after")
    def _schedule_fits(self):
        if self.automatic:  # checked again when they are numbers
            return self
        end = self.lr_decay_iters or self.max_steps
        if self.decay_lr and not end:
            raise ValueError(
                "decay_lr needs an end: give lr_decay_iters or max_steps, or set decay_lr to false"
            )
        if self.decay_lr and self.warmup_ratio is None and self.warmup_iters >= end:
            raise ValueError(f"warmup_iters={self.warmup_iters} must be below the end of the decay, {end}")
        if not self.decay_lr and (self.warmup_ratio or self.warmdown_ratio):
            raise ValueError("warmup_ratio and warmdown_ratio are for decay_lr, and decay_lr is false")
        warmup = self.warmup_iters if self.warmup_ratio is None else self.warmup_ratio * end
        if self.warmdown_ratio and warmup + self.warmdown_ratio * end > end * (1 + 1e-9):
            raise ValueError(
                f"warmdown_ratio={self.warmdown_ratio} of {end} steps begins before the warm-up of "
                f"{warmup:g} steps ends; lower one of them"
            )
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}")
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self):
        for key in ("matrix_lr", "momentum"):
            if self.optimizer != "muon" and getattr(self, key) is not None:
                raise ValueError(f'{key} is for optimizer "muon", and optimizer is "{self.optimizer}"')
        return self


class DeepSpeedConfig(Schema):
    """config/deepspeed_config.json: DeepSpeed's own file, without what the run's configuration says."""

    train_batch_size: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description='the global batch; "auto": batch_size x gradient_accumulation_steps of the run'
    )
    train_micro_batch_size_per_gpu: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description='sequences in one forward pass; "auto": as many as batch_size allows'
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description='forward passes of one process per step; "auto": what the two above leave'
    )
    gradient_clipping: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto", description='largest gradient norm; "auto": grad_clip of the run'
    )
    zero_optimization: dict[str, Any] = Field(
        description="stage 0 to 3, offload_optimizer, offload_param, ...: see DeepSpeed's documentation"
    )

    @model_validator(mode="before")
    @classmethod
    def _has_one_home(cls, values):
        elsewhere = {"optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast"} & values.keys()
        if elsewhere:
            raise ValueError(
                f"optimizer, schedule and precision are set in the run's configuration, and only there; "
                f"remove {', '.join(sorted(elsewhere))}"
            )
        return values
