"""The settings of a training run: frozen, validated, the same in JSON, as flags and in MLflow.

The defaults are the paper's (Ni, Fang, Huttunen, ICPR 2020). A recipe (`recipes.py`) is a named
`TrainConfig`; every field is a flag, such as `--optimizer.learning-rate 3e-4`.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_shards.errors import ConfigError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
LOADERS = 4  # most loader processes of a worker, unless it is told otherwise

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # torchvision's
TIMM = "timm:"  # before the name of one of timm's models


class Section(BaseModel):
    """Base of all configuration sections: immutable, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BatchConfig(Section):
    """The global batch: P identities × K images, whatever the number of workers."""

    identities: Count = 16
    """P, people in a global batch; the training split must have as many."""
    images: Annotated[int, Field(ge=2)] = 4
    """K, images of each person; at least 2, so that every anchor has a positive."""
    steps_per_epoch: Count | None = 200
    """Optimizer steps per epoch; None uses every group of K images once."""
    small_identities: Literal["replace", "drop"] = "replace"
    """People with fewer than K images: draw with replacement, or drop them as the authors do."""
    window: Count = 16
    """Shards that are shuffled together; the node's cache must hold two windows."""
    accumulate: Count = 1
    """Global batches per optimizer step; their gradients are averaged."""
    datasets: Literal["mixed", "apart"] = "mixed"
    """In a merged dataset: batches of people from all of its datasets, or each batch from one."""


class ImageConfig(Section):
    """Size of the network's input."""

    height: Count = 384
    """Height in pixels."""
    width: Count = 128
    """Width in pixels."""


class AugmentConfig(Section):
    """Augmentation of training images, on the device, a batch at a time."""

    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    pad: Annotated[int, Field(ge=0)] = 10
    """Pixels of zero padding on each side before the random crop."""
    erase: Fraction = 0.5
    """Probability of random erasing."""


class ModelConfig(Section):
    """The network: shared stages, then a global and a regional branch with a last stage each."""

    backbone: str = "resnet50"
    """torchvision's resnet18, 34, 50, 101 or 152, or timm:NAME, such as timm:convnext_tiny."""
    weights: str = "imagenet"
    """Backbone weights: 'imagenet' (timm's own for timm:NAME), 'none', or a path or s3:// URL."""
    stripes: Annotated[int, Field(ge=0)] = 2
    """Horizontal stripes of the regional branch; 0 removes the branch."""
    batch_norm: Literal["global", "local"] = "global"
    """Batch norm over the global batch, or over each worker's part of it."""
    pooling: Literal["average", "gem"] = "average"
    """Pooling of each head: the average, clipped to [0, 1], or GeM with a learnt exponent."""
    embedding: Literal["pooled", "bnneck"] = "pooled"
    """Each head's part of the embedding: its pooled features, or those after its batch norm."""
    embedding_size: Count | None = None
    """Length of the embedding; None: the channels of the last stage, twice with stripes."""

    @field_validator("backbone")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in RESNETS and not (value.startswith(TIMM) and value != TIMM):
            raise ValueError(f"must be {', '.join(RESNETS)} or {TIMM}NAME, not {value!r}")
        return value


class AmplitudeConfig(Section):
    """Amplitude by kind of tensor; None uses --regularization.amplitude."""

    kernel: NonNegative | None = None
    """Amplitude of convolution and linear weights, and of embeddings."""
    bias: NonNegative | None = None
    """Amplitude of convolution and linear biases."""
    gamma: NonNegative | None = None
    """Amplitude of the weights of norms, and of layer scales."""
    beta: NonNegative | None = None
    """Amplitude of the biases of norms."""

    def given(self) -> dict[str, float]:
        """The kinds whose amplitude is set."""
        return {kind: value for kind, value in self.model_dump().items() if value is not None}


class RegularizationConfig(Section):
    """L2 regularization in the loss: a learnt λ per tensor, one constant λ, or none."""

    mode: Literal["adaptive", "constant", "none"] = "adaptive"
    """How λ is set."""
    amplitude: NonNegative = 0.005
    """A in λ = A·hardsigmoid(θ), the largest λ (adaptive)."""
    amplitudes: AmplitudeConfig = AmplitudeConfig()
    """Amplitudes by kind of tensor (adaptive)."""
    saturation: Positive = 2.5
    """c in hardsigmoid(θ) = clip(θ / 2c + 1/2, 0, 1) (adaptive)."""
    theta_lr_multiplier: NonNegative = 1.0
    """Learning rate of θ, as a multiple of the weights'; the paper uses 1 (adaptive)."""
    factor: NonNegative = 0.0005
    """λ of every tensor (constant)."""
    exclude: tuple[str, ...] = ()
    """Patterns (fnmatch) of tensor names to leave unregularized."""


class LossConfig(Section):
    """The losses of every head and their weights; a weight of None leaves a loss out."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Label smoothing of the cross-entropy, in [0, 1)."""
    cross_entropy_weight: NonNegative = 1.0
    """Weight of each head's cross-entropy; the classifiers train on nothing else."""
    triplet_weight: NonNegative | None = 1.0
    """Weight of each head's batch-hard triplet loss."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any(weight for name, weight in self if name.endswith("_weight")):
            raise ValueError("no loss has a weight: set one such as --loss.triplet-weight 1")
        return self


class OptimizerConfig(Section):
    """Adam, the two training phases, and the learning rate by epoch."""

    learning_rate: Positive = 2e-4
    """Learning rate after the warm-up."""
    minimum_learning_rate: NonNegative = 2e-6
    """Learning rate at the start of the warm-up, and the floor of the decay."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """Decay after the warm-up."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    """Epochs of linear warm-up (step schedule)."""
    decay_every: Count = 30
    """Epochs between divisions of the learning rate by 10 (step schedule)."""
    frozen_epochs: Annotated[int, Field(ge=0)] = 20
    """Epochs of the first phase, with the backbone frozen."""
    epochs: Count = 200
    """Epochs of the second phase, with all weights trained."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's decay rate of the gradient's mean."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's decay rate of the squared gradient's mean."""
    epsilon: Positive = 1e-7
    """Adam's ε."""
    clip_norm: Positive | None = None
    """Largest norm of the whole gradient, with the regularizer's part; None does not clip."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """Steps with a gradient that is not finite that a run may skip; one more ends the run."""


class EvaluationConfig(Section):
    """Evaluation during training, which chooses the best checkpoint."""

    split: Literal["auto", "validation", "test"] = "auto"
    """Query and gallery to evaluate on: the dataset's validation split, or its test split as the
    paper does; auto is validation if there is one. Then test is measured once, at the end."""
    every: Count = 10
    """Epochs between evaluations; the last epoch is always evaluated."""
    initial: bool = True
    """Evaluate before the first step, to show metrics before and after."""
    batch: Count = 128
    """Images that a worker embeds at a time."""
    mirror: bool = True
    """Average the embeddings of an image and of its mirror image."""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """Distance of the ranking."""
    rank_list: bool = True
    """Show the top matches of a few queries, as images, in the report."""


class LoaderConfig(Section):
    """How a worker reads its images."""

    workers: Annotated[int, Field(ge=0)] | None = None
    """Decoding processes of each worker; 0 decodes in the worker's own process; None: one for each
    core that the workers leave free, at most 4."""
    cache: Path = Path("~/.cache/reid/shards")
    """Folder of the node's shard cache."""
    cache_bytes: Count = 200 * 10**9
    """Largest size of the cache, in bytes."""

    @property
    def node_cache(self) -> tuple[Path, int]:
        """The cache's folder, without `~`, and its size."""
        from data_shards.storage import expand_home  # not at the top: a served model has no storage

        return expand_home(self.cache).absolute(), self.cache_bytes


class CheckpointConfig(Section):
    """When to write checkpoints (the two best by mAP and the last are kept), and failures."""

    every_steps: Count | None = 500
    """Optimizer steps between checkpoints; None writes them only after evaluations."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Failures of workers before the run gives up; -1 for no limit."""
    hang_seconds: Annotated[int, Field(ge=10)] = 600
    """Seconds without an answer after which all workers restart."""


class TrackingConfig(Section):
    """MLflow: where to track runs and register models."""

    uri: str | None = None
    """MLflow server; None: MLFLOW_TRACKING_URI, or SQLite beside the output; 'off': none."""
    experiment: str = "reid"
    """MLflow experiment."""
    model_name: str | None = None
    """Name in the model registry; None: reid-<dataset>; 'off': do not register."""
    every_steps: Count = 10
    """Optimizer steps between two logged losses (reading them waits for the device)."""


class TrainConfig(Section):
    """All settings of a run; with the data, they decide its result."""

    recipe: str = "msmt17_resnet50"
    """Recipe that gives all other defaults: see `recipes`."""
    data: str = ""
    """Sharded dataset: s3://bucket/prefix or a folder (needed)."""
    output: str = ""
    """Where runs are kept: s3://bucket/prefix or a folder (needed)."""
    name: str | None = None
    """Name of the run, a folder under the output; None: recipe and time."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, batches and augmentation."""
    init_from: str | None = None
    """Start from another training's weights, with new classifiers: a run or checkpoint (folder or
    s3:// URL), models:/name@champion, or the file of a state dict that this program saved."""
    init_theta: Literal["new", "keep"] = "new"
    """Whether θ starts at 0, or where that training left it."""
    init_digest: str | None = None
    """SHA-256 of these weights, which a run records; if given, others are refused."""
    workers: Count = 1
    """Training workers, with a GPU each if there are GPUs; they share the global batch."""
    cpus_per_worker: Count | None = None
    """Cores of each worker; None: on CPUs the nodes' cores, shared by the workers, with GPUs 1."""
    min_workers: Count | None = None
    """Fewest workers to continue with when nodes leave; None waits for all workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses GPUs if the Ray cluster has enough for all workers."""
    precision: Literal["auto", "bf16", "fp16", "float32"] = "auto"
    """auto runs the network in bfloat16 where the device has it, in float16 on other GPUs."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile network and regularizer with torch.compile. auto: on GPUs, unless --deterministic."""
    deterministic: bool = False
    """Use deterministic kernels only; slower on CUDA, no difference on CPUs."""
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

    @field_validator("compile", mode="before")
    @classmethod
    def _written_before(cls, value: object) -> object:
        return ("off", "on")[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        size = self.batch.identities * self.batch.images
        if size % self.workers:
            raise ValueError(
                f"a global batch of {self.batch.identities} × {self.batch.images} = {size} images "
                f"cannot be shared equally by {self.workers} workers: change --workers or --batch"
            )
        if self.model.batch_norm == "local" and size == self.workers > 1:
            raise ValueError(
                "--model.batch-norm local needs 2 images or more a worker: lower --workers"
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
    def from_json(cls, text: str | bytes, where: str = "configuration") -> Self:
        """Read a configuration; raise a `ConfigError` for what this version does not accept."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(f"{where}: {explain(error)}") from error

    def replace(self, **changes: object) -> Self:
        """A validated copy; `replace(optimizer__epochs=3)` changes a field of a section."""
        values = self.model_dump()
        for name, value in changes.items():
            *sections, field = name.split("__")
            inner = values
            for section in sections:
                inner = inner[section]
            inner[field] = value
        try:
            return self.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error)) from error

    def flat(self) -> dict[str, object]:
        """Dotted names to values, for MLflow's parameters."""
        return _flatten(self.model_dump(mode="json"))


def explain(error: ValidationError) -> str:
    """A validation error as one line."""
    parts = []
    for item in error.errors():
        place = ".".join(map(str, item["loc"]))
        parts.append(f"{place}: " * bool(place) + item["msg"].removeprefix("Value error, "))
    return "; ".join(parts)


def _flatten(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
