"""The training loop of one worker: the paper's algorithm, from top to bottom.

Nothing here knows Ray or MLflow. A batch is global: each worker takes its slice, batch norm and the
triplet loss see all of it, and DDP averages the gradients, so one worker and eight compute the same
step.
"""

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from data_shards.dataset import Dataset
from data_shards.index import Index
from data_shards.loading.loader import Batch, Decoders
from reid_train import transforms
from reid_train.config import TrainConfig
from reid_train.model.collectives import gather_with_gradient, require_equal
from reid_train.model.network import ReidNet
from reid_train.model.precision import autocast, compute_dtype, set_precision
from reid_train.model.pretrained import build_model
from reid_train.regularization import AdaptiveL2
from reid_train.training.checkpoint import UNMEASURED, Checkpoint, Origin, Position, save
from reid_train.training.compiled import find_compiler, make_finish, wrap
from reid_train.training.context import Stopped, StopRequest, WorkerContext
from reid_train.training.data import epoch_plan, make_decoders, step_batches, train_index
from reid_train.training.history import History, factor_metrics, tracked
from reid_train.training.initial import Initial
from reid_train.training.losses import LOSSES, HeadBatch, loss_weights
from reid_train.training.nonfinite import NonFiniteFilter
from reid_train.training.optimizer import (
    Regularizer,
    build_optimizer,
    build_regularizer,
    set_learning_rate,
)
from reid_train.training.step_metrics import StepRows, StepWindow
from reid_train.training.validation import Validation, validate

logger = logging.getLogger(__name__)

FACTOR_ROWS = 400  # of λ over time that a run keeps, about


def train(
    config: TrainConfig,
    dataset: Dataset,
    context: WorkerContext,
    resume: Checkpoint | None = None,
    initial: Initial | None = None,
) -> None:
    """Train until the last epoch, from the beginning or from a checkpoint.

    Args:
        config: the run.
        dataset: it is trained on the train split, and evaluated on its validation or test split if
            it has one.
        context: this process's place among the others.
        resume: the checkpoint to continue from.
        initial: the weights to start from without a checkpoint, instead of pretrained ones.

    Raises:
        DataError: there are no training images, the checkpoint is of another dataset, or a loss or
            a gradient is not finite.
        Stopped: the worker was asked to stop; a checkpoint was reported.
    """
    if config.deterministic:
        # cuBLAS is deterministic only with a workspace of fixed size, and reads this once.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic  # all batches have one shape
    set_precision(config)
    compiled = find_compiler(config, context.device)
    index = train_index(dataset)
    manifest = dataset.manifest
    identities = int(index.label.max()) + 1
    shards = [shard for shard in manifest.shards if shard.split == "train"]
    context.cache.require(shards, config.batch.window)
    origin = Origin(manifest.digest, manifest.evaluation_digest, identities)

    # A checkpoint has all weights, so the file of pretrained ones may be gone by now.
    has_weights = resume is not None or initial is not None
    fresh = config.replace(model__weights="none") if has_weights else config
    model = build_model(fresh, identities)
    model = model.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    regularizer = build_regularizer(config, model)
    state = RunState(Position(), History())
    if resume is not None:
        resume.require(origin)
        resume.load_model(model)
        resume.load_theta(regularizer)
        state = RunState(resume.progress, resume.history(), resume.progress.global_step)
        place = state.progress
        if context.rank == 0:
            logger.info("resuming after step %d, in epoch %d", place.global_step, place.epoch + 1)
    elif initial is not None:
        initial.load(model, regularizer)
    state.history.split = dataset.choose_split(config.evaluation.split)
    if regularizer is not None:
        state.history.tensor_names = list(regularizer.names)
        state.history.tensor_kinds = list(regularizer.kinds)

    with closing(make_decoders(config, dataset, context)) as decoders:
        for phase, end in (("heads", config.optimizer.frozen_epochs), ("all", config.total_epochs)):
            if state.progress.epoch >= end:
                continue
            model.freeze_backbone(phase == "heads")
            optimizer = build_optimizer(config, model, regularizer)
            within = resume if state.progress.phase == phase else None
            state.progress.phase = phase
            loop = TrainLoop(
                config=config,
                dataset=dataset,
                index=index,
                context=context,
                origin=origin,
                decoders=decoders,
                model=model,
                network=wrap(model, config, context, compiled=compiled),
                finish_gradients=make_finish(config, regularizer, optimizer, compiled=compiled),
                regularizer=regularizer,
                optimizer=optimizer,
                state=state,
            )
            if within is not None:
                within.load_optimizer(optimizer)
                within.load_loss_scaler(loop.nonfinite.loss_scaler)
            loop.run(end)


@dataclass
class RunState:
    """What a run carries from one phase to the next. Checkpoints hold progress and history."""

    progress: Position
    history: History
    saved_step: int | None = None  # global step of the last checkpoint
    saturated: set[str] = field(default_factory=set)  # ends of λ's range, "0" or "A", warned about


@dataclass
class TrainLoop:
    """The training of one phase: the heads on a frozen backbone, or the whole network.

    Attributes:
        network: the model, compiled if asked for, and in DDP if there are several workers.
        finish_gradients: adds the penalty's gradients, clips, and returns the whole norm.
        weights: the weight of each loss.
        plan: rows of the train index for the current epoch, (steps · accumulate, P·K) int64.
    """

    config: TrainConfig
    dataset: Dataset
    index: Index
    context: WorkerContext
    origin: Origin
    decoders: Decoders
    model: ReidNet
    network: nn.Module
    finish_gradients: Callable[[], torch.Tensor]
    regularizer: Regularizer | None
    optimizer: torch.optim.Adam
    state: RunState

    def __post_init__(self) -> None:
        self.progress, self.history = self.state.progress, self.state.history
        self.weights = loss_weights(self.config.loss)
        self.autocast = autocast(self.config, self.context.device)
        self.dtype = compute_dtype(self.config, self.context.device)
        allowed, half = self.config.optimizer.skip_nonfinite, self.dtype == torch.float16
        self.nonfinite = NonFiniteFilter(allowed, self.progress.skipped, self.model, half=half)
        self.step_rows = StepWindow(self.context)
        self.plan = np.zeros((0, 0), np.int64)

    @property
    def steps(self) -> int:
        """Optimizer steps of the current epoch."""
        return len(self.plan) // self.config.batch.accumulate

    def run(self, end: int) -> None:
        """Train until `end` epochs are done, counted over both phases."""
        config, progress = self.config, self.progress
        if config.evaluation.initial and progress.global_step == 0:
            self.evaluate()
        first = progress.epoch
        for epoch in range(first, end):
            set_learning_rate(self.optimizer, config, epoch)
            self.plan = epoch_plan(config, self.dataset, epoch)
            place = self.dataset, self.context, self.decoders
            steps = step_batches(config, *place, self.plan, progress.step)
            if epoch == first:
                self.show_place()
            for batches in self.step_rows.timed(steps):
                self.train_step(batches)
                request = self.log_step()
                if request or self.checkpoint_is_due():
                    self.save_checkpoint()
                if request == StopRequest.STOP:
                    raise Stopped
            progress.epoch, progress.step = epoch + 1, 0
            last = progress.epoch == config.total_epochs
            if last or progress.epoch % config.evaluation.every == 0:
                self.save_checkpoint(self.evaluate())
            elif self.checkpoint_is_due():
                self.save_checkpoint()

    def train_step(self, batches: list[Batch]) -> None:
        """Take one optimizer step on `accumulate` global batches.

        Average the gradient of the losses, add the regularizer's once, clip, step. So clipping
        bounds the gradient of L + Σ λ‖w‖² (METHOD, "The regularizer"), as if the penalty were in L.
        """
        self.nonfinite.before_forward()
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for micro, batch in enumerate(batches):
            not_last = self.context.world > 1 and micro < len(batches) - 1
            with self.network.no_sync() if not_last else nullcontext():  # type: ignore[operator]
                losses = self.weighted_losses(batch, micro)
                self.nonfinite.scale(losses.sum() / len(batches)).backward()
            parts.append(losses.detach())
        self.nonfinite.unscale(self.optimizer)
        norm = self.finish_gradients()
        # optimizer.step(), unless the gradient is not finite
        skipped = self.nonfinite.step(self.optimizer, norm)
        mean_losses = torch.stack(parts).mean(0)
        zero = mean_losses.new_zeros(())
        penalty = zero if self.regularizer is None else self.regularizer.last_penalty
        self.step_rows.add(torch.cat([mean_losses, torch.stack([penalty, skipped.to(penalty)])]))
        self.progress.step += 1
        self.progress.global_step += 1

    def weighted_losses(self, batch: Batch, micro: int) -> torch.Tensor:
        """Return this rank's losses, weighted and summed over the heads (METHOD, "The network").

        The batch, on the device, is this rank's part of global batch `micro` of the step. The
        losses are (number of losses,), in the order of `self.weights`.
        """
        config, context = self.config, self.context
        own = context.slice(config.batch_size)
        drawn = transforms.draw(
            seed=config.seed,
            step=self.progress.global_step * config.batch.accumulate + micro,
            batch=config.batch_size,
            **config.image.model_dump(),
            **config.augment.model_dump(),
        ).rows(own)
        # In the type that autocast would convert it to.
        scaled = {"dtype": self.dtype, "pixels": self.model.pixels}
        image = transforms.apply(batch.image, drawn, **scaled, pad=config.augment.pad)
        label = batch.label
        with self.autocast():
            output = self.network(image)
        all_label = gather_with_gradient(label)
        heads = []
        for logits, pooled in zip(output.logits, output.pooled, strict=True):
            pooled = pooled.float()
            all_pooled = gather_with_gradient(pooled)
            heads.append(HeadBatch(pooled, logits, label, all_pooled, all_label, own.start))
        losses = []
        for name, weight in self.weights.items():
            by_head = torch.stack([LOSSES[name](head, config.loss) for head in heads])
            losses.append(weight * by_head.sum())
        return torch.stack(losses)

    def log_step(self) -> StopRequest:
        """Every few steps, and before a checkpoint: read the losses, record, track, show them.

        Return what the run is asked to do; raise a `DataError` if a loss or gradient is not finite.
        """
        progress, context = self.progress, self.context
        due = progress.step % self.config.tracking.every_steps == 0 or progress.step == self.steps
        if not (due or self.checkpoint_is_due()):
            return StopRequest.NONE
        read = self.step_rows.read()
        first = progress.global_step - len(read.rows) + 1
        names = [*(name.replace("_", "-") for name in self.weights), "penalty"]
        self.nonfinite.check(
            read.rows, names, first, self._images, self.state.saved_step, log=context.rank == 0
        )
        progress.skipped = self.nonfinite.skipped
        speed = self.config.batch_size * self.config.batch.accumulate / read.step_seconds
        self._record(read, first, speed)
        self._record_factors()
        self.show_place(loss=float(read.rows[-1, :-1].sum()), images_per_second=speed)
        return read.request

    def show_place(self, **figures: float) -> None:
        """Show where the run is (rank 0)."""
        if self.context.rank == 0:
            place = {"epoch": self.progress.epoch, "epochs": self.config.total_epochs}
            place |= {"step": self.progress.step, "steps": self.steps}
            self.context.show({**place, **figures})

    def evaluate(self) -> Validation:
        """Measure the model now; the metrics go to the history and the tracker."""
        began = time.monotonic()
        if (group := self.context.host_group) is not None:
            if self.config.model.batch_norm == "local":
                # It leaves each rank its own statistics; rank 0's are saved.
                for buffer in self.model.buffers():
                    dist.broadcast(buffer, src=0)
            theta = {} if self.regularizer is None else dict(self.regularizer.named_parameters())
            require_equal(self.model.state_dict() | theta, group)
        place = self.dataset, self.context, self.decoders
        known = self.history.evaluations.get("mAP", [])
        best = max(known, default=0.0) if self.progress.epoch else math.inf
        result = validate(self.config, *place, self.model, self.autocast, best=best)
        if result.metrics:
            step = self.progress.global_step
            self.history.add_evaluation(self.progress.epoch, result.metrics, step)
            split = self.history.split
            self.context.log(tracked(result.metrics, split), step)
            shown: dict[str, object] = {"epoch": self.progress.epoch, "metrics": result.metrics}
            self.context.show(shown | {"split": split, "seconds": time.monotonic() - began})
        self.step_rows.restart_clock()
        return result

    def checkpoint_is_due(self) -> bool:
        """Return whether a checkpoint is due by `every_steps`, in an epoch or when it is done."""
        every = self.config.checkpoint.every_steps
        inside = self.progress.step < self.steps
        return every is not None and inside and self.progress.global_step % every == 0

    def save_checkpoint(self, measured: Validation | None = None) -> None:
        """Write a checkpoint of finite weights only (rank 0), and report it (every rank)."""
        measured = measured or Validation()
        folder = None
        if self.context.rank == 0:
            folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self.context.scratch))
            save(
                folder,
                config=self.config,
                origin=self.origin,
                progress=self.progress,
                history=self.history,
                model=self.model,
                regularizer=self.regularizer,
                optimizer=self.optimizer,
                loss_scaler=self.nonfinite.loss_scaler,
                rank_list=measured.rank_list,
            )
        position = {"epoch": self.progress.epoch, "step": self.progress.global_step}
        self.context.report(position | {"mAP": UNMEASURED} | measured.metrics, folder)
        self.state.saved_step = self.progress.global_step
        self.step_rows.restart_clock()

    def _record(self, read: StepRows, first: int, speed: float) -> None:
        """Put steps into the history and the tracker."""
        for step, (*losses, penalty, _) in enumerate(read.rows.tolist(), first):
            values = {f"loss/{name}": loss for name, loss in zip(self.weights, losses, strict=True)}
            values |= {
                "loss/penalty": penalty,
                "loss/total": sum(losses) + penalty,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "images_per_second": speed,
            }
            self.history.add_step(step, values)
            if self.context.rank == 0:
                times = {"step_seconds": read.step_seconds, "data_wait_seconds": read.wait_seconds}
                self.context.log(values | times, step)

    def _record_factors(self) -> None:
        """Put λ into the history and the tracker, about `FACTOR_ROWS` times a run."""
        if not isinstance(self.regularizer, AdaptiveL2):
            return
        interval = self.steps * self.config.total_epochs // FACTOR_ROWS
        step, recorded = self.progress.global_step, self.history.factor_steps
        if recorded and step - recorded[-1] < interval:
            return
        factors = self.regularizer.factor_vector().detach().float().cpu().numpy()
        self.history.add_factors(step, factors)
        if self.context.rank > 0:
            return
        self.context.log(factor_metrics(factors), step)
        for end, names in self.regularizer.saturated(factors).items():
            if names and end not in self.state.saturated:
                self.state.saturated.add(end)
                where = f"{len(names)} of {len(factors)} tensors (first {names[0]})"
                logger.warning("θ is saturated at λ = %s for %s at step %d", end, where, step)

    def _images(self, global_step: int) -> list[str]:
        """Return the names of the images of a global step of this epoch."""
        accumulate = self.config.batch.accumulate
        position = self.progress.step - (self.progress.global_step - global_step) - 1
        rows = self.plan[position * accumulate : (position + 1) * accumulate].ravel()
        return [str(path) for path in self.index.path[rows]]
