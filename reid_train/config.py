"""What a training run is told: frozen, validated, the same in JSON, in flags and in MLflow.

The defaults are the paper's (Ni, Fang, Huttunen, ICPR 2020). A recipe (`recipes.py`) is a named
`TrainConfig`; every field is a flag, such as `--optimizer.learning-rate 3e-4`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_shards.errors import ConfigError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all configuration sections: immutable, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BatchConfig(Section):
    """The global batch: P identities × K images, whatever the number of workers."""

    identities: Count = 16
    """P, identities in a global batch."""
    images: Annotated[int, Field(ge=2)] = 4
    """K, images of each identity; at least 2, or no anchor has a positive."""
    steps_per_epoch: Count | None = 200
    """Optimizer steps an epoch; None uses every group of K images once."""
    small_identities: Literal["replace", "drop"] = "replace"
    """Identities with fewer than K images: drawn with replacement, or dropped as the authors do."""
    window: Count = 16
    """Shards that are mixed at a time; two windows are held in the node's cache."""
    accumulate: Count = 1
    """Global batches whose gradients are averaged in one optimizer step."""


class ImageConfig(Section):
    """Size of the network's input."""

    height: Count = 384
    """Pixels."""
    width: Count = 128
    """Pixels."""


class AugmentConfig(Section):
    """Augmentation of training images, on the device, for the whole batch."""

    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    pad: Annotated[int, Field(ge=0)] = 10
    """Pixels of zero padding on each side before the random crop."""
    erase: Fraction = 0.5
    """Probability of random erasing."""


class ModelConfig(Section):
    """The network (METHOD: shared stages, a doubled last stage, a global and a regional branch)."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    """torchvision's ResNet (v1.5), with stride 1 in the last stage."""
    weights: str = "imagenet"
    """Backbone weights: 'imagenet', 'none', or a path or s3:// URL of a state dict."""
    stripes: Annotated[int, Field(ge=0)] = 2
    """Horizontal stripes of the regional branch; 0 leaves the branch out."""
    batch_norm: Literal["global", "local"] = "global"
    """Statistics of the global batch, whatever the number of workers, or of each worker's part."""


class AmplitudeConfig(Section):
    """Amplitude by kind of tensor; None takes `regularization.amplitude`."""

    kernel: NonNegative | None = None
    bias: NonNegative | None = None
    gamma: NonNegative | None = None
    beta: NonNegative | None = None

    def given(self) -> dict[str, float]:
        """The kinds whose amplitude is set."""
        return {kind: value for kind, value in self.model_dump().items() if value is not None}


class RegularizationConfig(Section):
    """L2 regularization in the loss: λ learnt per tensor, one constant λ, or none."""

    mode: Literal["adaptive", "constant", "none"] = "adaptive"
    """Which of the three."""
    amplitude: NonNegative = 0.005
    """A in λ = A·hardsigmoid(θ)."""
    amplitudes: AmplitudeConfig = AmplitudeConfig()
    """Amplitudes by kind of tensor."""
    saturation: Positive = 2.5
    """c in hardsigmoid(θ) = clip(θ / 2c + 1/2, 0, 1)."""
    theta_lr_multiplier: NonNegative = 1.0
    """Learning rate of θ as a multiple of the weights'; 1 as published."""
    factor: NonNegative = 0.0005
    """λ of every tensor in the constant mode."""
    exclude: tuple[str, ...] = ()
    """Patterns (fnmatch) of tensor names to leave out."""


class LossConfig(Section):
    """Cross-entropy and batch-hard triplet loss on every head."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Label smoothing of the cross-entropy."""
    cross_entropy_weight: NonNegative = 1.0
    """Weight of each head's cross-entropy."""
    triplet_weight: NonNegative = 1.0
    """Weight of each head's triplet loss."""


class OptimizerConfig(Section):
    """Adam, and the two phases' learning rate by epoch."""

    learning_rate: Positive = 2e-4
    """Learning rate after the warm-up."""
    minimum_learning_rate: NonNegative = 2e-6
    """Where the warm-up starts, and the floor of the decay."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """Decay after the warm-up."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    """Epochs of linear warm-up (step schedule)."""
    decay_every: Count = 30
    """Epochs between divisions by 10 (step schedule)."""
    frozen_epochs: Annotated[int, Field(ge=0)] = 20
    """Epochs of the first phase, the backbone frozen."""
    epochs: Count = 200
    """Epochs of the second phase, everything trained."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Positive = 1e-7
    clip_norm: Positive | None = None
    """Largest norm of the whole gradient, the regularizer's part included; None does not clip."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """Steps of a run that are skipped where the gradient is not finite; one more ends the run."""


class EvaluationConfig(Section):
    """Retrieval on the query and gallery splits while training."""

    every: Count = 10
    """Epochs between evaluations; the last epoch is always evaluated."""
    initial: bool = True
    """Evaluate before the first step, so that the summary shows before and after."""
    batch: Count = 128
    """Images a worker embeds at a time."""
    mirror: bool = True
    """Average the embeddings of an image and of its mirror image."""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """Distance of the ranking."""


class LoaderConfig(Section):
    """How images reach a worker."""

    workers: Annotated[int, Field(ge=0)] = 4
    """Decoding processes of each training worker; 0 decodes in the worker itself."""
    cache: Path = Path("~/.cache/reid/shards")
    """The node's shard cache."""
    cache_bytes: Count = 200 * 10**9
    """Bound of the cache, in bytes."""


class CheckpointConfig(Section):
    """When a checkpoint is written; the two best by mAP and the last are kept."""

    every_steps: Count | None = 500
    """Optimizer steps between checkpoints; None writes one after each evaluation only."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Failures of workers to recover from before the run is given up; -1 for no bound."""
    hang_seconds: Annotated[int, Field(ge=10)] = 600
    """How long a worker may be silent, or wait for another, until all start again from the last
    checkpoint; more than the first rank takes to rank the gallery."""


class TrackingConfig(Section):
    """MLflow: where runs are tracked and models registered."""

    uri: str | None = None
    """MLflow; None takes MLFLOW_TRACKING_URI, or SQLite beside the output; 'off' is none."""
    experiment: str = "reid"
    """MLflow experiment."""
    model_name: str | None = None
    """Name in the model registry; None is 'reid-<dataset>'; 'off' registers nothing."""
    every_steps: Count = 10
    """Optimizer steps between looks at the losses (each waits for the device)."""


class TrainConfig(Section):
    """Everything that decides a run, apart from the data itself."""

    recipe: str = "msmt17_resnet50"
    """Name of the recipe that the other values started from."""
    data: str = ""
    """Sharded dataset: s3://bucket/prefix or a folder."""
    output: str = ""
    """Where runs are kept: s3://bucket/prefix or a folder."""
    name: str | None = None
    """Name of the run, a folder under the output; None makes one from the recipe and the time."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, batches and augmentation."""
    workers: Count = 1
    """Training workers (one GPU each where there are GPUs); they share the global batch."""
    min_workers: Count | None = None
    """Fewest workers to go on with where nodes come and go; None waits for all `workers`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs if the Ray cluster has enough for all workers."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """auto runs the network in bfloat16 where the device has it."""
    compile: bool = False
    """Compile the network with torch.compile."""
    deterministic: bool = False
    """Only deterministic kernels (on CUDA slower; the CPU's are so anyway)."""
    batch: BatchConfig = BatchConfig()
    image: ImageConfig = ImageConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    regularization: RegularizationConfig = RegularizationConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    loader: LoaderConfig = LoaderConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        size = self.batch.identities * self.batch.images
        if size % self.workers:
            raise ValueError(
                f"a global batch of {self.batch.identities} × {self.batch.images} = {size} images "
                f"cannot be shared equally by {self.workers} workers: change --workers or --batch"
            )
        if (self.min_workers or 1) > self.workers:
            raise ValueError(f"--min-workers {self.min_workers} is above --workers {self.workers}")
        if self.batch.identities < 2:
            raise ValueError("--batch.identities must be at least 2, or no anchor has a negative")
        if self.optimizer.minimum_learning_rate > self.optimizer.learning_rate:
            raise ValueError("--optimizer.minimum-learning-rate is above the learning rate")
        if self.name and (set(self.name) & set("/\\:?#%") or self.name.startswith(".")):
            raise ValueError(f"--name {self.name!r} must be usable as a folder's name")
        return self

    @property
    def batch_size(self) -> int:
        """Images of a global batch, P × K."""
        return self.batch.identities * self.batch.images

    @property
    def total_epochs(self) -> int:
        """Epochs of both phases."""
        return self.optimizer.frozen_epochs + self.optimizer.epochs

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "configuration") -> TrainConfig:
        """Read a configuration.

        Raises:
            ConfigError: a name or value that this version does not accept.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(f"{where}: {explain(error)}") from error

    def replace(self, **changes: object) -> TrainConfig:
        """A validated copy; `replace(optimizer__epochs=3)` changes a field of a section."""
        values = self.model_dump()
        for name, value in changes.items():
            *sections, field = name.split("__")
            inner = values
            for section in sections:
                inner = inner[section]
            inner[field] = value
        try:
            return TrainConfig.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error)) from error

    def flat(self) -> dict[str, object]:
        """Dotted names to values, for MLflow's parameters."""
        return dict(_flatten("", self.model_dump(mode="json")))


def explain(error: ValidationError) -> str:
    """A validation error as one line."""
    parts = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{place}: {message}" if place else message)
    return "; ".join(parts)


def _flatten(prefix: str, values: dict):
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            yield from _flatten(name, value)
        else:
            yield name, value
