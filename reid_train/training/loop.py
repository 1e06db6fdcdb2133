"""The training loop of one worker, from top to bottom as the paper's algorithm.

Nothing here knows Ray or MLflow. A batch is global: each worker takes its slice, batch norm and the
triplet loss see all of it, and DDP averages the gradients; so one worker and eight compute the same
step.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data_shards.dataset import Dataset
from data_shards.errors import DataError
from data_shards.loader import Batch, train_batches
from data_shards.manifest import Index
from data_shards.sampler import plan, slice_for_rank
from reid_train import transforms
from reid_train.config import TrainConfig
from reid_train.model.collectives import gather_with_gradient
from reid_train.model.factory import build_model
from reid_train.model.precision import autocast, set_precision
from reid_train.regularization import AdaptiveL2
from reid_train.training.checkpoint import Checkpoint, Origin, Progress, save
from reid_train.training.context import UNMEASURED, Asked, Stopped, Worker
from reid_train.training.history import History, factor_metrics
from reid_train.training.losses import batch_hard_triplet, label_smoothing_cross_entropy
from reid_train.training.nonfinite import Guard
from reid_train.training.optimizer import build_optimizer, build_regularizer, set_learning_rate
from reid_train.training.step_metrics import Meter
from reid_train.training.validation import Validation, validate

logger = logging.getLogger(__name__)

FACTOR_ROWS = 400
"""About how many rows of λ over time a run keeps."""


def train(config: TrainConfig, dataset: Dataset, worker: Worker, start: Path | None = None) -> None:
    """Train until the last epoch, from the beginning or from a checkpoint.

    Args:
        config: the run.
        dataset: its train split is learnt; query and gallery, where it has them, are measured.
        worker: this process's place among the others.
        start: folder of a checkpoint to continue from.

    Raises:
        DataError: no training images, another dataset's checkpoint, or a loss or a gradient that is
            not finite.
        Stopped: the worker was asked to stop; a checkpoint was reported.
    """
    if config.deterministic:
        # cuBLAS repeats itself with a workspace of fixed size alone, and reads this once.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    set_precision(config)
    index = train_index(dataset)
    manifest = dataset.manifest
    identities = int(index.label.max()) + 1
    shards = [shard for shard in manifest.shards if shard.split == "train"]
    worker.cache.require(shards, config.batch.window)
    origin = Origin(manifest.digest, manifest.evaluation_digest, identities)

    # A checkpoint has weights of its own; the pretrained ones need not be there any more.
    fresh = config if start is None else config.replace(model__weights="none")
    model = build_model(fresh, identities)
    model = model.to(worker.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    regularizer = build_regularizer(config, model)
    progress, history, saved = Progress(), History(), None
    if start is not None:
        saved = Checkpoint.open(start)
        saved.require(origin)
        saved.load_model(model)
        saved.load_theta(regularizer)
        progress, history = saved.progress, saved.history()
        logger.info("continuing at epoch %d, step %d", progress.epoch, progress.step)

    if regularizer is not None:
        history.tensor_names = list(regularizer.names)
        history.tensor_kinds = list(regularizer.kinds)
    run = _Run(config, dataset, worker, origin, model, regularizer, progress, history)
    if config.evaluation.initial and progress.global_step == 0:
        run.validate()

    frozen = config.optimizer.frozen_epochs
    for phase, end in (("heads", frozen), ("all", config.total_epochs)):
        if progress.epoch >= end:
            continue
        model.freeze_backbone(phase == "heads")
        run.network = _parallel(model, config, worker)
        run.optimizer = build_optimizer(config, model, regularizer)
        if saved is not None and saved.progress.phase == phase:
            saved.load_optimizer(run.optimizer)
        progress.phase = phase
        for epoch in range(progress.epoch, end):
            set_learning_rate(run.optimizer, config, epoch)
            run.rows = rows = epoch_plan(config, index, epoch)
            steps = len(rows) // config.batch.accumulate
            batches_of_steps = _steps(config, dataset, worker, rows, progress.step)
            for batches in run.meter.waiting(batches_of_steps):
                run.step(batches)
                asked = run.watch(steps)
                if asked or run.checkpoint_is_due(steps):
                    run.checkpoint(Validation())
                if asked == Asked.STOP:
                    raise Stopped
            progress.epoch, progress.step = epoch + 1, 0
            last = progress.epoch == config.total_epochs
            if last or progress.epoch % config.evaluation.every == 0:
                run.checkpoint(run.validate())
            elif run.checkpoint_is_due(steps):
                run.checkpoint(Validation())


def train_index(dataset: Dataset) -> Index:
    """The images to learn.

    Raises:
        DataError: there are none.
    """
    index = dataset.index("train")
    if len(index) == 0:
        raise DataError(f"{dataset.url} has no train split: build it with training images")
    return index


def epoch_plan(config: TrainConfig, index: Index, epoch: int) -> np.ndarray:
    """Rows of the train index for an epoch's global batches, (steps · accumulate, P·K) int64."""
    batch = config.batch
    steps = batch.steps_per_epoch
    rows = plan(
        index,
        seed=config.seed,
        epoch=epoch,
        identities=batch.identities,
        images=batch.images,
        window=batch.window,
        steps=None if steps is None else steps * batch.accumulate,
        small=batch.small_identities,
    )
    return rows[: len(rows) // batch.accumulate * batch.accumulate]


def _steps(
    config: TrainConfig, dataset: Dataset, worker: Worker, rows: np.ndarray, start: int
) -> Iterator[list[Batch]]:
    """This rank's batches from optimizer step `start`, `accumulate` at a time."""
    batches = train_batches(
        dataset,
        worker.cache,
        slice_for_rank(rows, worker.rank, worker.world),
        start=start * config.batch.accumulate,
        height=config.image.height,
        width=config.image.width,
        workers=config.loader.workers,
    )
    while group := list(islice(batches, config.batch.accumulate)):
        yield group


def _parallel(model: nn.Module, config: TrainConfig, worker: Worker) -> nn.Module:
    network = torch.compile(model) if config.compile else model
    if worker.world == 1:
        return network  # type: ignore[return-value]
    exact = config.deterministic or worker.device.type == "cpu"
    with warnings.catch_warnings():
        # PyTorch 2.14 renames the setting; the older name holds from 2.11 on.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return DistributedDataParallel(
            network,  # type: ignore[arg-type]
            device_ids=[worker.device] if worker.device.type == "cuda" else None,
            # Global statistics are the same on every rank already.
            broadcast_buffers=config.model.batch_norm == "local",
            gradient_as_bucket_view=True,
            # Else the buckets are laid out anew after the first step, and with three workers and
            # more sums depend on that: a resumed run would take its first step another way.
            find_unused_parameters=exact,
        )


class _Run:
    """The state that a step, a look at the losses, an evaluation and a checkpoint share."""

    network: nn.Module
    optimizer: torch.optim.Adam
    rows: np.ndarray
    """The plan of the epoch that is under way."""

    def __init__(self, config, dataset, worker, origin, model, regularizer, progress, history):
        self.config: TrainConfig = config
        self.dataset: Dataset = dataset
        self.worker: Worker = worker
        self.origin: Origin = origin
        self.model = model
        self.regularizer = regularizer
        self.progress: Progress = progress
        self.history: History = history
        self.autocast = autocast(config, worker.device)
        self.meter = Meter(worker)
        self.guard = Guard(config.optimizer.skip_nonfinite, progress.skipped, model)
        self.kept_step: int | None = progress.global_step or None
        """Global step of the last checkpoint."""
        self.saturated: set[str] = set()

    def step(self, batches: list[Batch]) -> None:
        """One optimizer step on `accumulate` global batches.

        The order is: average the gradients of the loss, add the regularizer's once, clip, step; so
        clipping bounds the gradient of L + Σ λ‖w‖² (METHOD §1), as with the penalty in the loss.
        """
        self.guard.before_forward()
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for micro, batch in enumerate(batches):
            quiet = self.worker.world > 1 and micro < len(batches) - 1
            with self.network.no_sync() if quiet else nullcontext():  # type: ignore[operator]
                losses = self._losses(batch, micro)
                (losses.sum() / len(batches)).backward()
            parts.append(losses.detach())
        if self.regularizer is not None:
            self.regularizer.add_gradients()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        bound = self.config.optimizer.clip_norm or float("inf")
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if bound < float("inf"):
            nn.utils.clip_grads_with_norm_(parameters, bound, norm)
        bad = self.guard.step(self.optimizer, norm)
        losses = torch.stack(parts).mean(0)
        penalty = (
            losses.new_zeros(()) if self.regularizer is None else self.regularizer.last_penalty
        )
        self.meter.add(torch.cat([losses, torch.stack([penalty, bad.to(penalty)])]))
        self.progress.step += 1
        self.progress.global_step += 1

    def _losses(self, batch: Batch, micro: int) -> torch.Tensor:
        """Weighted cross-entropy and triplet loss, (2,), each summed over the heads (METHOD §3)."""
        config, worker = self.config, self.worker
        drawn = transforms.draw(
            seed=config.seed,
            step=self.progress.global_step * config.batch.accumulate + micro,
            batch=config.batch_size,
            height=config.image.height,
            width=config.image.width,
            flip=config.augment.flip,
            pad=config.augment.pad,
            erase=config.augment.erase,
        ).rows(worker.slice(config.batch_size))
        image = transforms.apply(batch.image_on(worker.device), drawn)
        label = batch.label.to(worker.device, non_blocking=True)
        with self.autocast():
            output = self.network(image)
        everyone = gather_with_gradient(label) if worker.world > 1 else label
        cross_entropy, triplet = [], []
        for logits, pooled in zip(output.logits, output.pooled, strict=True):
            pooled = pooled.float()
            others = gather_with_gradient(pooled) if worker.world > 1 else pooled
            cross_entropy.append(
                label_smoothing_cross_entropy(logits.float(), label, config.loss.label_smoothing)
            )
            triplet.append(batch_hard_triplet(pooled, label, others, everyone))
        return torch.stack(
            [
                config.loss.cross_entropy_weight * torch.stack(cross_entropy).sum(),
                config.loss.triplet_weight * torch.stack(triplet).sum(),
            ]
        )

    def watch(self, steps: int) -> Asked:
        """Every few steps, and before a checkpoint: read the losses, record, track, show them.

        Returns:
            What the run is asked to do now.

        Raises:
            DataError: a loss or gradient is not finite.
        """
        progress, worker = self.progress, self.worker
        due = progress.step % self.config.tracking.every_steps == 0 or progress.step == steps
        if not (due or self.checkpoint_is_due(steps)):
            return Asked.NOTHING
        rows, step_seconds, wait_seconds, asked = self.meter.read()
        speed = self.config.batch_size * self.config.batch.accumulate / step_seconds
        first = progress.global_step - len(rows) + 1
        self.guard.check(rows, first, self._images, self.kept_step, say=worker.rank == 0)
        progress.skipped = self.guard.skipped
        for step, (cross_entropy, triplet, penalty, _) in enumerate(rows.tolist(), first):
            values = {
                "loss/cross_entropy": cross_entropy,
                "loss/triplet": triplet,
                "loss/penalty": penalty,
                "loss/total": cross_entropy + triplet + penalty,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "images_per_second": speed,
            }
            self.history.add_step(step, values)
            if worker.rank == 0:
                times = {"step_seconds": step_seconds, "data_wait_seconds": wait_seconds}
                worker.log(values | times, step)
        self._watch_factors(steps)
        if worker.rank == 0:
            worker.show(
                {
                    "epoch": progress.epoch,
                    "epochs": self.config.total_epochs,
                    "step": progress.step,
                    "steps": steps,
                    "loss": float(rows[-1, :3].sum()),
                    "images_per_second": speed,
                }
            )
        return asked

    def _images(self, step: int) -> list[str]:
        """Names of the images of a global step of this epoch."""
        accumulate = self.config.batch.accumulate
        position = self.progress.step - (self.progress.global_step - step) - 1
        rows = self.rows[position * accumulate : (position + 1) * accumulate].ravel()
        return [str(path) for path in self.dataset.index("train").path[rows]]

    def _watch_factors(self, steps: int) -> None:
        if self.regularizer is None or self.config.regularization.mode != "adaptive":
            return
        interval = steps * self.config.total_epochs // FACTOR_ROWS
        step, recorded = self.progress.global_step, self.history.factor_steps
        if recorded and step - recorded[-1] < interval:
            return
        factors = self.regularizer.factor_vector().detach().float().cpu().numpy()
        self.history.add_factors(step, factors)
        if self.worker.rank == 0:
            self.worker.log(factor_metrics(factors), step)
            self._note_saturation(factors)

    def _note_saturation(self, factors: np.ndarray) -> None:
        """Say once for each end of its range that λ has reached it."""
        assert isinstance(self.regularizer, AdaptiveL2)
        for end, names in self.regularizer.saturated(factors).items():
            if names and end not in self.saturated:
                self.saturated.add(end)
                where = f"{len(names)} of {len(factors)} tensors (first {names[0]})"
                step = self.progress.global_step
                logger.warning("θ is saturated at λ = %s for %s at step %d", end, where, step)

    def validate(self) -> Validation:
        """Measure the model now; the metrics go to the history and the tracker."""
        if self.worker.world > 1:
            # Local batch norm leaves each rank statistics of its own; saved are the first rank's.
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)
        result = validate(self.config, self.dataset, self.worker, self.model, self.autocast)
        if result.metrics:
            step = self.progress.global_step
            self.history.add_evaluation(self.progress.epoch, result.metrics, step)
            self.worker.log(result.metrics, step)
            self.worker.show({"epoch": self.progress.epoch, "metrics": result.metrics})
        self.meter.restart_clock()
        return result

    def checkpoint_is_due(self, steps: int) -> bool:
        """Every `checkpoint.every_steps` steps; after an epoch's last one, once it is over."""
        every = self.config.checkpoint.every_steps
        over = self.progress.step < steps
        return every is not None and over and self.progress.global_step % every == 0

    def checkpoint(self, measured: Validation) -> None:
        """Write a checkpoint (rank 0) and report it (every rank).

        Raises:
            DataError: a weight is not finite.
        """
        folder = None
        metrics = {"mAP": UNMEASURED, **measured.metrics}
        if self.worker.rank == 0:
            folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self.worker.scratch))
            save(
                folder,
                config=self.config,
                origin=self.origin,
                progress=self.progress,
                history=self.history,
                model=self.model,
                regularizer=self.regularizer,
                optimizer=self.optimizer,
                rank_list=measured.rank_list,
            )
        position = {"epoch": self.progress.epoch, "step": self.progress.global_step}
        self.worker.report(position | metrics, folder)
        self.kept_step = self.progress.global_step
        self.meter.restart_clock()
