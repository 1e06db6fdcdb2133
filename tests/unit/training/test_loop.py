"""The training loop: exact continuation, the order of a step, the same on any number of workers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_workers
from safetensors.torch import load_file
from tiny import Recorded, build_dataset, config, make_worker, narrow_resnet18, run, state
from torch import nn
from torchvision.models import resnet

from data_shards.dataset import Dataset
from data_shards.errors import DataError
from data_shards.loading.loader import train_batches
from reid_train import transforms
from reid_train.config import TrainConfig
from reid_train.model.pretrained import build_model
from reid_train.training import validation
from reid_train.training.checkpoint import MODEL, RANK_LIST, TRAINING, UNMEASURED, Checkpoint
from reid_train.training.data import epoch_plan
from reid_train.training.loop import train
from reid_train.training.losses import batch_hard_triplet, label_smoothing_cross_entropy
from reid_train.training.optimizer import build_optimizer, build_regularizer, set_learning_rate

pytestmark = pytest.mark.usefixtures("small_and_quick")
WORLD = 2
# Adam's first steps are the signs of the gradients, whatever their size. A large ε makes it follow
# them instead, so that rounding stays rounding, and what is clipped is seen.
SMOOTH = {"optimizer__epsilon": 1.0, "optimizer__learning_rate": 0.01}


class Enough(Exception):
    """Ends a training after a checkpoint."""


def next_checkpoint(dataset, settings: TrainConfig, scratch: Path, start: Path) -> Path:
    """Continue from a checkpoint to the one after it."""
    worker, recorded = make_worker(dataset, scratch)

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        recorded.report(metrics, folder)
        raise Enough

    worker.report = report
    with pytest.raises(Enough):
        train(settings, dataset, worker, Checkpoint.open(start))
    return recorded.checkpoints[0]


# --- resumption -------------------------------------------------------------------------------

RESUMED = config(
    batch__accumulate=2,
    optimizer__epochs=2,
    optimizer__clip_norm=5.0,
    checkpoint__every_steps=1,
    tracking__every_steps=2,
)
CHECKPOINTS = 9  # one after each step: 3 epochs of 3


@pytest.fixture(scope="module")
def uninterrupted(tiny_dataset: Dataset) -> Iterator[list[Path]]:
    with tempfile.TemporaryDirectory() as folder:
        yield run(tiny_dataset, RESUMED, Path(folder)).checkpoints


@pytest.mark.parametrize("step", range(CHECKPOINTS - 1))
def test_resumed_run_takes_the_very_step_that_came_next(
    tiny_dataset, uninterrupted, tmp_path, step
):
    after = next_checkpoint(tiny_dataset, RESUMED, tmp_path, uninterrupted[step])
    assert state(after) == state(uninterrupted[step + 1])


def test_resumed_run_ends_as_the_uninterrupted_one(tiny_dataset, uninterrupted, tmp_path):
    resumed = run(tiny_dataset, RESUMED, tmp_path, uninterrupted[1])
    assert len(uninterrupted) == CHECKPOINTS
    assert len(resumed.checkpoints) == CHECKPOINTS - 2
    assert state(resumed.checkpoints[-1]) == state(uninterrupted[-1])


def test_checkpoint_due_at_an_epochs_end_is_written_there(tiny_dataset, tmp_path):
    settings = config(optimizer__epochs=2, checkpoint__every_steps=3, evaluation__every=3)
    written = run(tiny_dataset, settings, tmp_path).checkpoints
    assert [Checkpoint.open(folder).progress.global_step for folder in written] == [3, 6, 9]
    for folder in written[:2]:  # after the frozen phase, and within the other
        resumed = run(tiny_dataset, settings, tmp_path, folder).checkpoints[-1]
        assert state(resumed) == state(written[-1])


def test_checkpoint_holds_the_losses_of_every_step_before_it(uninterrupted):
    for number, folder in enumerate(uninterrupted, 1):
        assert Checkpoint.open(folder).history().steps["step"] == list(range(1, number + 1))


def test_finished_run_that_is_resumed_changes_nothing(tiny_dataset, uninterrupted, tmp_path):
    resumed = run(tiny_dataset, RESUMED, tmp_path, uninterrupted[-1])
    assert resumed == Recorded()


def test_checkpoint_of_another_dataset_is_refused(uninterrupted, tmp_path):
    other = Dataset.open(build_dataset(tmp_path / "other", ("query", "train", "gallery")))
    with pytest.raises(DataError, match="another --name"):
        run(other, RESUMED, tmp_path, uninterrupted[0])


# --- one step ---------------------------------------------------------------------------------


def expected_weights(dataset: Dataset, settings: TrainConfig) -> dict[str, torch.Tensor]:
    """Weights and θ after one step, as METHOD has it: the penalty in the loss, all by autograd."""
    index = dataset.index("train")
    model = build_model(settings, int(index.label.max()) + 1)
    regularizer = build_regularizer(settings, model)
    optimizer = build_optimizer(settings, model, regularizer)
    set_learning_rate(optimizer, settings, 0)
    worker, _ = make_worker(dataset, Path())
    rows = epoch_plan(settings, dataset, 0)
    size = {"height": settings.image.height, "width": settings.image.width}
    total = torch.zeros(()) if regularizer is None else regularizer.penalty()
    for number, batch in enumerate(train_batches(dataset, worker.cache, rows, **size, workers=0)):
        drawn = transforms.draw(
            seed=settings.seed,
            step=number,
            batch=settings.batch_size,
            **size,
            flip=settings.augment.flip,
            pad=settings.augment.pad,
            erase=settings.augment.erase,
        )
        output = model(transforms.apply(batch.image, drawn, pad=settings.augment.pad))
        for logits, pooled in zip(output.logits, output.pooled, strict=True):
            total = total + batch_hard_triplet(pooled, batch.label) / len(rows)
            total = total + label_smoothing_cross_entropy(logits, batch.label, 0.1) / len(rows)
    total.backward()
    if settings.optimizer.clip_norm is not None:
        everything = [*model.parameters(), *(regularizer.parameters() if regularizer else ())]
        nn.utils.clip_grad_norm_(everything, settings.optimizer.clip_norm)
    optimizer.step()
    theta = regularizer.theta_by_name() if settings.regularization.mode == "adaptive" else {}
    return {name: p.detach() for name, p in model.named_parameters()} | {
        f"theta/{name}": torch.tensor(value) for name, value in theta.items()
    }


@pytest.mark.parametrize("clip_norm", [None, 0.5], ids=["free", "clipped"])
@pytest.mark.parametrize("mode", ["adaptive", "constant", "none"])
def test_step_follows_the_averaged_clipped_gradient_of_loss_and_penalty(
    tiny_dataset, tmp_path, mode, clip_norm
):
    settings = config(
        **SMOOTH,
        batch__accumulate=2,
        batch__steps_per_epoch=1,
        optimizer__frozen_epochs=0,
        optimizer__clip_norm=clip_norm,
        optimizer__schedule="constant",
        regularization__mode=mode,
    )
    expected = expected_weights(tiny_dataset, settings)
    folder = run(tiny_dataset, settings, tmp_path).checkpoints[0]
    actual = load_file(folder / MODEL) | load_file(folder / TRAINING)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_phase_changes_neither_backbone_nor_its_factors(tiny_dataset, tmp_path):
    settings = config(optimizer__epochs=1, checkpoint__every_steps=2, evaluation__every=2)
    folder = run(tiny_dataset, settings, tmp_path).checkpoints[0]
    model = build_model(settings, 6)
    before, after = model.state_dict(), load_file(folder / MODEL)
    backbone = ("trunk.", "global_layer4.", "regional_layer4.")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert Checkpoint.open(folder).progress.phase == "heads"
    assert not [name for name in moved if name.startswith(backbone)]
    assert {name for name, _ in model.named_parameters() if not name.startswith(backbone)} <= moved
    theta = {k: v for k, v in load_file(folder / TRAINING).items() if k.startswith("theta/")}
    still = {name for name, value in theta.items() if value == 0}
    assert still == {f"theta/{n}" for n, _ in model.named_parameters() if n.startswith(backbone)}


def test_loss_that_is_not_finite_ends_the_run_and_names_the_step(tiny_dataset, tmp_path):
    settings = config(
        optimizer__learning_rate=1e30, optimizer__frozen_epochs=0, optimizer__schedule="constant"
    )
    with pytest.raises(DataError, match=r"not finite at step 2 .*--optimizer\.learning-rate"):
        run(tiny_dataset, settings, tmp_path)


def test_no_checkpoint_is_written_once_the_loss_is_not_finite(tiny_dataset, tmp_path):
    settings = config(
        optimizer__learning_rate=1e30,
        optimizer__frozen_epochs=0,
        optimizer__schedule="constant",
        checkpoint__every_steps=2,
        tracking__every_steps=100,
    )
    worker, recorded = make_worker(tiny_dataset, tmp_path)
    with pytest.raises(DataError, match="not finite at step 2"):
        train(settings, tiny_dataset, worker)
    assert recorded.checkpoints == []


def test_dataset_without_query_and_gallery_is_learnt_unmeasured(tmp_path):
    dataset = Dataset.open(build_dataset(tmp_path / "train-only", ("train",)))
    recorded = run(dataset, config(optimizer__frozen_epochs=0), tmp_path)
    assert [metrics["mAP"] for metrics in recorded.metrics] == [UNMEASURED]


def test_dataset_without_train_split_is_refused(tmp_path):
    dataset = Dataset.open(build_dataset(tmp_path / "test-only", ("query", "gallery")))
    with pytest.raises(DataError, match="no train split"):
        run(dataset, config(), tmp_path)


# --- several workers --------------------------------------------------------------------------


def test_a_person_sees_where_the_run_is_before_its_first_step(tiny_dataset, tmp_path):
    worker, _ = make_worker(tiny_dataset, tmp_path)
    states: list[dict] = []
    worker.show = states.append
    train(config(optimizer__epochs=2, tracking__every_steps=1), tiny_dataset, worker)
    first, second, *_ = (state for state in states if "step" in state)
    assert (first["epoch"], first["step"], "loss" in first) == (0, 0, False)
    assert (second["epoch"], second["step"], "loss" in second) == (0, 1, True)


TOGETHER = config(**SMOOTH, batch__accumulate=2, regularization__theta_lr_multiplier=10.0).replace(
    evaluation__every=9
)
APART = TOGETHER.replace(model__batch_norm="local", evaluation__every=1)


def _train_together(rank: int, url: str, settings: str, scratch: str) -> dict[str, object]:
    """One worker of two: its losses, the weights that it measured, the images that it embedded."""
    resnet.resnet18 = narrow_resnet18
    dataset = Dataset.open(url)
    worker, recorded = make_worker(dataset, Path(scratch), rank, WORLD)
    embedded: dict[str, list[int]] = {"query": [], "gallery": []}
    weights: dict[str, torch.Tensor] = {}
    batches, measure = validation.split_batches, validation.embed_batches

    def note_rows(dataset, cache, split, **options):
        for batch in batches(dataset, cache, split, **options):
            embedded[split] += batch.row.tolist()
            yield batch

    def note_weights(model, *arguments, **options):
        weights.update({name: value.clone() for name, value in model.state_dict().items()})
        return measure(model, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "split_batches", note_rows)
        patch.setattr(validation, "embed_batches", note_weights)
        train(TrainConfig.from_json(settings), dataset, worker)
    return {
        "losses": recorded.losses(),
        "metrics": recorded.metrics[-1],
        "embedded": embedded,
        "weights": weights,
    }


def _train_both(rank: int, url: str, scratch: str) -> dict[str, dict]:
    return {
        name: _train_together(rank, url, settings.to_json(), scratch)
        for name, settings in (("together", TOGETHER), ("apart", APART))
    }


@pytest.fixture(scope="module")
def workers(tiny_dataset: Dataset) -> Iterator[list[dict]]:
    """What each of two workers had, with global and with local batch norm."""
    with tempfile.TemporaryDirectory() as folder:
        yield run_workers(_train_both, WORLD, tiny_dataset.url, folder)


@pytest.fixture(scope="module")
def together(tiny_dataset: Dataset, workers) -> Iterator[tuple[Recorded, list[dict]]]:
    """The same training by one worker and by two."""
    with tempfile.TemporaryDirectory() as folder:
        yield run(tiny_dataset, TOGETHER, Path(folder)), [worker["together"] for worker in workers]


def test_two_workers_have_the_losses_of_one(together):
    alone, (first, _) = together
    assert len(alone.losses()) == 6
    np.testing.assert_allclose(first["losses"], alone.losses(), rtol=1e-4)


def test_two_workers_end_with_the_weights_of_one(together):
    alone, (first, _) = together
    expected = load_file(alone.checkpoints[-1] / MODEL)
    for name, value in expected.items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["together", "apart"])
def test_workers_measure_equal_weights_and_statistics(workers, name):
    first, second = (worker[name]["weights"] for worker in workers)
    for tensor, value in first.items():
        assert torch.equal(second[tensor], value), tensor


def test_evaluation_embeds_each_image_once_over_all_workers(tiny_dataset, together):
    _, workers = together
    for split in ("query", "gallery"):
        rows = [row for worker in workers for row in worker["embedded"][split]]
        assert rows == list(range(len(tiny_dataset.index(split))))


def test_two_workers_measure_what_one_does(together):
    alone, (first, _) = together
    assert first["metrics"].keys() == alone.metrics[-1].keys()
    for name, value in alone.metrics[-1].items():
        assert first["metrics"][name] == pytest.approx(value, abs=0.02), name


def test_validation_is_measured_if_there_is_one_and_test_if_asked_for(tmp_path):
    dataset = Dataset.open(build_dataset(tmp_path, validation=0.34))
    for split, prefix in (("auto", "validation/"), ("validation", "validation/"), ("test", "")):
        settings = config(evaluation__split=split, optimizer__frozen_epochs=0)
        recorded = run(dataset, settings, tmp_path)
        (logged,) = (
            v
            for values in recorded.steps.values()
            for k, v in values.items()
            if k == f"{prefix}mAP"
        )
        assert logged == recorded.metrics[-1]["mAP"]
        with np.load(recorded.checkpoints[-1] / RANK_LIST) as rank_list:
            queries, gallery = dataset.evaluated("test" if split == "test" else "validation")
            assert rank_list["query"].max() < len(queries)
            assert json.loads(str(rank_list["thresholds"]))["impostors"] > 0
            assert rank_list["gallery"].max() < len(gallery)
            assert set(gallery.pid[rank_list["map_row"]]) == set(queries.pid)


def test_thresholds_of_too_many_pairs_do_not_hold_the_training_up(tmp_path, monkeypatch):
    monkeypatch.setattr("reid_train.training.validation.THRESHOLD_PAIRS", 1)
    dataset = Dataset.open(build_dataset(tmp_path))
    recorded = run(dataset, config(optimizer__frozen_epochs=0), tmp_path)
    with np.load(recorded.checkpoints[-1] / RANK_LIST) as rank_list:
        assert "query" in rank_list
        assert "thresholds" not in rank_list


def test_best_checkpoint_is_measured_on_test_as_a_training_measures(tmp_path):
    dataset = Dataset.open(build_dataset(tmp_path, validation=0.34))
    settings = config(optimizer__frozen_epochs=0, evaluation__split="test")
    recorded = run(dataset, settings, tmp_path)
    checkpoint = Checkpoint.open(recorded.checkpoints[-1])
    worker, _ = make_worker(dataset, tmp_path)
    again = settings.replace(evaluation__split="validation")
    metrics = validation.measure_test(again, dataset, worker, checkpoint)
    assert metrics == {name: recorded.metrics[-1][name] for name in metrics}
    assert metrics["mAP"] > 0
