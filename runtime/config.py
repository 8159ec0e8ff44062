"""Every setting of a run, one frozen dataclass per component (no torch: a mistake is told before the imports)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.errors import ConfigInvalid


def setting(default: Any, help: str) -> Any:  # noqa: A002  (a field of any type)
    """A field with its default and the sentence that `--help` shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    preset: str = setting("tiny", "named sizes to start from; every other key of [model] overrides one")
    vocab_size: int = setting(256, "token ids; bytes need 256")
    hidden_size: int = setting(128, "width of the residual stream")
    intermediate_size: int = setting(352, "width inside the SwiGLU block")
    num_layers: int = setting(4, "decoder layers")
    num_heads: int = setting(4, "query heads")
    num_kv_heads: int = setting(2, "key and value heads, shared by groups of query heads")
    head_size: int = setting(0, "width of one head; 0: hidden_size / num_heads")
    rope_theta: float = setting(10_000.0, "base of the rotary embedding's frequencies")
    norm_eps: float = setting(1e-5, "added to the mean square in RMSNorm")
    tie_embeddings: bool = setting(True, "the head uses the embedding's weight")
    dropout: float = setting(0.0, "probability, after attention and after the SwiGLU block")
    init_std: float = setting(0.02, "of the initial weights; the last matrix of a block gets less, by its depth")

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        if self.num_heads % self.num_kv_heads:
            raise ConfigInvalid(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}",
                next="each key/value head serves the same number of query heads",
            )
        if self.head_size == 0 and self.hidden_size % self.num_heads:
            raise ConfigInvalid(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads {self.num_heads}",
                next="change one of them, or set model.head_size",
            )
        if self.head_width % 2:
            raise ConfigInvalid(f"heads are {self.head_width} wide; rotary embedding turns pairs, so it must be even")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigInvalid(f"model.dropout is {self.dropout}, expected 0 <= dropout < 1")

    @property
    def head_width(self) -> int:
        """Elements of one head."""
        return self.head_size or self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Sizes of the mesh's axes; their product is the number of ranks."""

    replicate: int = setting(1, "copies of the model (data parallel); 0: whatever ranks the other axes leave")
    shard: int = setting(0, "ranks that share one copy (FSDP2); 0: whatever ranks the other axes leave")
    tensor: int = setting(1, "reserved, must be 1")
    pipeline: int = setting(1, "reserved, must be 1")
    context: int = setting(1, "reserved, must be 1")
    expert: int = setting(1, "reserved, must be 1")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a layout is carried out."""

    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of forward and backward; auto: bfloat16 where an accelerator has it. Weights and sums stay float32"
    )
    activation_checkpointing: Literal["none", "full"] = setting(
        "none", "full: keep only each layer's input, compute the rest again in the backward pass"
    )
    reshard_after_forward: bool = setting(True, "free gathered weights after forward and gather them again in backward")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is cut into samples."""

    source: str = setting("stdlib", "a directory or file of text; stdlib: the sources of Python's standard library")
    pattern: str = setting("*.py", "files to take from a directory")
    sequence_length: int = setting(128, "tokens predicted per sample")
    validation_percent: int = setting(5, "of the files, chosen by their hash, are held out")
    max_megabytes: float = setting(0.0, "stop reading after this much; 0: everything")
    workers: int = setting(0, "processes that prepare samples ahead; 0: none")

    def __post_init__(self) -> None:
        _at_least("data.sequence_length", self.sequence_length, 1)
        _at_least("data.workers", self.workers, 0)
        if not 1 <= self.validation_percent <= 50:
            raise ConfigInvalid(f"data.validation_percent is {self.validation_percent}, expected 1 to 50")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; matrices decay, norms do not."""

    lr: float = setting(1e-3, "peak learning rate")
    beta1: float = setting(0.9, "decay of the gradient's average")
    beta2: float = setting(0.95, "decay of the squared gradient's average")
    eps: float = setting(1e-8, "added to the denominator")
    weight_decay: float = setting(0.1, "per step and unit of learning rate, on matrices")
    clip_norm: float = setting(1.0, "largest global gradient norm; 0: no clipping")
    implementation: Literal["auto", "foreach", "fused", "loop"] = setting("auto", "auto: fused on CUDA, else foreach")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the steps: linear warm-up, then the chosen shape."""

    shape: Literal["cosine", "linear", "constant"] = setting("cosine", "after the warm-up")
    warmup_steps: int = setting(10, "steps from 0 to the peak")
    decay_steps: int = setting(0, "step at which the lowest rate is reached; 0: the last")
    floor: float = setting(0.1, "lowest rate, as a fraction of the peak")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = setting(100, "optimizer updates in all, across every restart")
    global_batch: int = setting(16, "samples per step, whatever the number of ranks")
    micro_batch: int = setting(16, "most samples in one forward and backward pass of a rank")
    seed: int = setting(0, "of initial weights, order of data, dropout")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda if there is one")

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch"):
            _at_least(f"train.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Loss on held-out text."""

    every_steps: int = setting(50, "steps between evaluations (also after the last); 0: only after the last")
    samples: int = setting(64, "held-out samples, the same ones each time; 0: never evaluate")
    micro_batch: int = setting(16, "samples per forward pass of a rank")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where and how often the state is saved."""

    url: str = setting("", "path or fsspec URL; empty: <output.directory>/checkpoints")
    every_steps: int = setting(50, "steps between saves; 0 with every_minutes 0: chosen from measured costs")
    every_minutes: float = setting(0.0, "minutes between saves, instead of every_steps 0")
    keep_last: int = setting(3, "newest steps to keep; 0: all")
    keep_best: int = setting(0, "also the steps with the lowest val_loss")
    codec: Literal["auto", "raw", "fast"] = setting("auto", "compression of what is stored")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What the run leaves to look at."""

    directory: str = setting("runs/tiny", "metrics-<rank>.jsonl, and checkpoints unless checkpoint.url says otherwise")
    progress: Literal["auto", "bar", "lines", "none"] = setting("auto", "auto: a bar on a terminal, else lines")
    every_steps: int = setting(10, "steps between printed lines")
    text_bytes: int = setting(200, "length of the text that the trained model writes at the end; 0: none")
    prompt: str = setting("def ", "how that text starts")
    digests: bool = setting(False, "record what every tensor was at each save and after a restore: slow, for proofs")
    temperature: float = setting(0.7, "of drawing that text; 0: always the likeliest byte")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @property
    def checkpoint_url(self) -> str:
        """Where checkpoints are kept."""
        return self.checkpoint.url or f"{self.output.directory}/checkpoints"


def _at_least(key: str, value: float, least: int) -> None:
    if value < least:
        raise ConfigInvalid(f"{key} is {value}, expected at least {least}")
