"""Reduced precision: what stays float32, and float16 with a scaled loss."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny import config, make_worker, run, state

from data_shards.errors import DataError
from reid_train.model.precision import precision_on
from reid_train.model.pretrained import build_model
from reid_train.training import losses
from reid_train.training.checkpoint import TRAINING, Checkpoint
from reid_train.training.loop import train
from reid_train.training.nonfinite import NonFiniteFilter

pytestmark = pytest.mark.usefixtures("small_and_quick")

HALF = config(
    precision="fp16",
    optimizer__frozen_epochs=0,
    optimizer__epochs=2,
    optimizer__clip_norm=1.0,
    checkpoint__every_steps=1,
    tracking__every_steps=1,
)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_gpus_without_bfloat16_use_float16(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert precision_on(config(precision="auto"), CUDA) == expected
    assert precision_on(config(precision="float32"), CUDA) == "float32"
    assert precision_on(config(precision="auto"), CPU) != "fp16"


def test_images_in_the_type_of_autocast_change_nothing():
    model = build_model(config(), 6)
    image = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = model(image), model(image.bfloat16())
    for name in ("pooled", "logits"):
        for a, b in zip(getattr(expected, name), getattr(found, name), strict=True):
            assert torch.equal(a, b)


def test_logits_are_float32_and_not_rounded_under_autocast():
    model = build_model(config(), 6)
    head = model.global_head
    features = torch.randn(4, 64, 2, 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        pooled, logits = head(features)
    assert pooled.dtype == logits.dtype == torch.float32
    head.train()
    assert torch.equal(logits, head.classifier(head.norm(pooled)))


# --- float16: AMP by the book -----------------------------------------------------------------


def _first_scale(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    make = torch.amp.GradScaler.__init__

    def small(self, *arguments, enabled: bool = True, **options) -> None:
        if enabled and "init_scale" not in options:
            options["init_scale"] = scale
        make(self, *arguments, enabled=enabled, **options)

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", small)


def test_loss_scale_changes_no_step_in_float32(tiny_dataset, tmp_path, monkeypatch):
    # Powers of two: float32 has the same digits at any scale, so any difference is a mistake in the
    # order of unscaling, penalty and clipping.
    plain = run(tiny_dataset, HALF.replace(precision="float32"), tmp_path)
    make = NonFiniteFilter.__init__

    def scaled(self, *arguments, half: bool) -> None:
        make(self, *arguments, half=True)

    monkeypatch.setattr(NonFiniteFilter, "__init__", scaled)
    _first_scale(monkeypatch, 1024.0)
    other = run(tiny_dataset, HALF.replace(precision="float32"), tmp_path)
    expected, found = (
        load_file(recorded.checkpoints[-1] / TRAINING) for recorded in (plain, other)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9, msg=name)
    assert found["loss_scaler/scale"] == 1024.0


def _overflowing(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    """Make gradients infinite while the loss is scaled by more than a limit, as in float16."""

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, *gradients):
            large = gradients[0].abs() > limit
            return torch.where(large, float("inf"), gradients[0])

    cross_entropy = losses.LOSSES["cross_entropy"]
    monkeypatch.setitem(
        losses.LOSSES, "cross_entropy", lambda *given: Overflow.apply(cross_entropy(*given))
    )


def test_overflow_lowers_the_scale_and_skips_weights_and_theta(tiny_dataset, tmp_path, monkeypatch):
    _overflowing(monkeypatch, limit=2.0**10)
    _first_scale(monkeypatch, 2.0**12)
    worker, recorded = make_worker(tiny_dataset, tmp_path)
    train(HALF.replace(precision="float32"), tiny_dataset, worker)  # not half: nothing is scaled
    assert len(recorded.losses()) == 6
    recorded = run(tiny_dataset, HALF, tmp_path)
    states = [load_file(folder / TRAINING) for folder in recorded.checkpoints]
    scales = [float(each["loss_scaler/scale"]) for each in states]
    assert scales == [2.0**11, *[2.0**10] * 5]
    theta = [torch.stack([v for k, v in each.items() if k.startswith("theta/")]) for each in states]
    assert not theta[1].any()  # the first two steps were skipped
    assert theta[2].any()
    assert Checkpoint.open(recorded.checkpoints[-1]).progress.skipped == 0


def test_gradient_that_overflows_at_any_scale_ends_the_run(tiny_dataset, tmp_path, monkeypatch):
    _overflowing(monkeypatch, limit=0.0)
    _first_scale(monkeypatch, 2.0)
    worker, recorded = make_worker(tiny_dataset, tmp_path)
    with pytest.raises(DataError, match="gradient is not finite at step 2 "):
        train(HALF, tiny_dataset, worker)
    assert len(recorded.checkpoints) == 1


def test_float16_run_resumes_to_the_same_bits(tiny_dataset, tmp_path, monkeypatch):
    _overflowing(monkeypatch, limit=2.0**10)
    _first_scale(monkeypatch, 2.0**12)
    whole = run(tiny_dataset, HALF, tmp_path).checkpoints
    again = run(tiny_dataset, HALF, tmp_path, whole[0]).checkpoints
    assert state(again[-1]) == state(whole[-1])
