"""Every setting of a run, in one tree: what a preset fills, overrides change and a checkpoint carries."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from zsr.config.base import Address, Config, Positive, Weight
from zsr.config.plugins import PluginConfig, PluginField, Registry

OBJECTIVES = Registry("objective", "zsr.objectives")
ATTACKS = Registry("attack", "zsr.attacks")
SCHEDULES = Registry("schedule", "zsr.attacks")
TRACKERS = Registry("tracker", "zsr.tracking")
DEFENSES = Registry("defense", "zsr.defenses")

Precision = Literal["fp32", "bf16"]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]


class ModelConfig(Config):
    """Which CLIP is fine-tuned."""

    name: str = "zsr:emoji-vit"
    """An open_clip architecture (``ViT-B-32``), ``hf-hub:owner/repo``, ``local-dir:folder``, or ``zsr:`` + embedded name."""
    pretrained: str | None = None
    """open_clip's pretrained tag, or a weights file, for an architecture name; the other forms bring their weights."""
    fast_layers: bool = True
    """Exchange open_clip's attention, linear layers and patch embedding for faster ones of equal parameters and results."""
    compile: bool = False
    """Compile the blocks of a ViT with torch.compile: a minute at the start for some per cent a step (docs/measurements.md).
    Where nothing can be compiled, a warning says so and training goes on without."""
    adapt: Literal["weights", "token_prompt", "pad_prompt", "prompts"] = "weights"
    """What fine-tuning changes: the image tower's weights, or prompts in front of the frozen tower (zsr/models/prompts.py):
    tokens, a border, or, with ``prompts``, both."""
    prompt_tokens: Count = 10
    """Of a token prompt: how many tokens a ViT gets beside its patches."""
    prompt_pixels: Count = 30
    """Of a padding prompt: width of the border that is added to the image."""
    attention_cap: Annotated[float, Field(ge=0, le=1)] = 0.0
    """RAM (zsr/models/robust_attention.py): most weight that the image tower's attention may give one key; 0 is off."""
    attention_drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """RAM: share of keys hidden at random in each attention of the image tower in evaluation; 0 is off."""
    expand_text: bool = False
    """Spread class embeddings out around their mean (LAAT), with the training classes' mean and widest angle."""

    @model_validator(mode="before")
    @classmethod
    def _earlier_name(cls, data: Any) -> Any:
        """Checkpoints from when attention was the only faster layer name the setting after it."""
        if isinstance(data, dict) and "fast_attention" in data:
            data = dict(data)
            data.setdefault("fast_layers", data.pop("fast_attention"))
        return data


class DataConfig(Config):
    """Where images come from. A set is a folder, ``s3://bucket/prefix`` or ``zsr:emoji/train``, with its index.json."""

    train: str = "zsr:emoji/train"
    val: str = "zsr:emoji/val"
    """Held-out classes or a held-out slice of the training data; selection never sees a test set."""
    template: str | None = None
    """Prompt with ``{}`` for the class name; the set's own first template when empty."""
    num_workers: CountOrNone = 0
    """Decoding processes per rank; 0 decodes in the training process."""
    last_batch: Literal["drop", "complete"] = "drop"
    """What becomes of the samples after the last full global batch: left out, or filled up with the epoch's first ones."""
    shuffle_window: Count = 8
    """Shards whose samples are mixed together; 1 shuffles inside each shard only."""
    cache_dir: str | None = None
    """Where shards from ``s3://`` are kept; a folder under the user's cache when empty."""


class OptimConfig(Config):
    """How weights move."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 1e-4
    text_lr_factor: Positive = 1.0
    """Learning rate of the text map in units of lr, for objectives that tune it; a visual prompt's rate is too high for it."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum; AdamW's first beta."""
    weight_decay: Weight = 0.0
    warmup_steps: CountOrNone = 0
    decay: Literal["cosine", "constant"] = "cosine"
    grad_clip: Weight = 0.0
    """Largest gradient norm; 0 leaves gradients as they are."""


class TrainConfig(Config):
    """How long and how big."""

    epochs: Count = 10
    max_steps: CountOrNone = 0
    """Stop after this many optimizer steps; 0 means all epochs. Schedules span what is really run."""
    batch_size: Count = 128
    """Global batch: it does not change with the number of workers."""
    precision: Precision = "fp32"
    """Of the encoder passes; weights, optimizer and losses stay fp32. There is no fp16: its attack gradients underflow."""
    cache_frozen: bool = False
    """Keep what the frozen model gives for a clean image, by sample: one pass less a step from the second epoch on. A resumed
    run then agrees with the uninterrupted one closely, no longer bit for bit."""
    log_every: Count = 10
    eval_every: CountOrNone = 0
    """Steps between quick evaluations; 0 evaluates once, at the end."""
    checkpoint_every: CountOrNone = 0
    """Steps between checkpoints; 0 writes one at each evaluation."""
    keep_checkpoints: Count = 2
    num_threads: CountOrNone = 0
    """CPU threads per worker; 0 leaves torch's choice."""


class EvalConfig(Config):
    """The quick evaluation inside training: clean and robust accuracy on the validation set."""

    attack: Annotated[PluginConfig, PluginField(ATTACKS)] = Field(
        default={"name": "pgd", "eps": "1/255", "step_size": "1/1020", "steps": 10}, validate_default=True
    )
    num_samples: CountOrNone = 512
    """The first so many samples of the set's fixed order; 0 means all."""
    batch_size: Count = 128


class TrackingConfig(Config):
    """Where metrics go. The tracker's own address comes from its usual environment variable when empty."""

    name: Literal["null", "jsonl", "mlflow"] = "jsonl"
    uri: Address | None = None
    experiment: str = "zsr"


class LaunchConfig(Config):
    """What the run asks of the cluster; ``zsr train --local`` ignores it."""

    workers: Count = 1
    """Processes that train together; with ``min_workers``, the most there may be."""
    min_workers: CountOrNone = 0
    """Go on with as few as this when nodes are lost, and grow again when they come back; 0 waits for all ``workers``."""
    resize_every_s: Positive = 60
    """With ``min_workers``: how often the cluster is looked at for room to grow; growing restarts from a checkpoint."""
    cpus_per_worker: Positive = 1
    gpus_per_worker: Weight = 0
    storage: str = ".zsr/runs"
    """Folder or ``s3://`` prefix for checkpoints."""
    search: Address | None = None
    """Database of a sweep's search, such as ``postgresql://user@host/database``, not MLflow's own; a journal when empty."""
    max_failures: CountOrNone = 2
    """Worker failures survived from the last checkpoint; preemptions are not counted."""
    gpu_hour_price: Weight = 0.0
    """Price of one GPU-hour (CPU-hour without GPUs), for the cost columns and --max-cost; 0 looks up ``machine``."""
    machine: str | None = None
    """Entry of the table of prices (zsr/launch/prices.yaml), such as ``aws/g6.12xlarge/spot``."""
    prices: str | None = None
    """YAML file whose entries are laid over that table."""


class RunConfig(Config):
    """One fine-tuning run."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: Annotated[PluginConfig, PluginField(OBJECTIVES)] = Field(default="tima", validate_default=True)
    attack: Annotated[PluginConfig, PluginField(ATTACKS)] = Field(default="pgd", validate_default=True)
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = Field(default_factory=EvalConfig)
    tracking: TrackingConfig = TrackingConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _fewest_are_not_more(self) -> RunConfig:
        if self.launch.min_workers > self.launch.workers:
            raise ValueError(
                f"launch.min_workers={self.launch.min_workers} is more than launch.workers={self.launch.workers}, the "
                "most there may be; lower one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> RunConfig:
        if self.train.batch_size % self.launch.workers:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} cannot be shared equally by launch.workers="
                f"{self.launch.workers}; make it a multiple of {self.launch.workers}"
            )
        return self

    def digest(self) -> str:
        """Sixteen hex digits that identify everything that can change the weights (not where or how it is run)."""
        content = self.model_dump(exclude={"name", "tracking", "launch"}, mode="json")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
