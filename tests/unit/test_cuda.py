"""The same results on a GPU: losses of a training, exact continuation, ranks, the penalty."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import config, run, state
from torch import nn

from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.ranking import rank
from reid_train.model import batch_norm
from reid_train.regularization import AdaptiveL2

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("small_and_quick"),
]
# As in test_loop: Adam follows the gradients, so that rounding stays rounding.
SMOOTH = config(
    optimizer__epsilon=1.0, optimizer__learning_rate=0.01, optimizer__epochs=2, compile="off"
)
EXACT = config(
    deterministic=True, optimizer__epochs=2, checkpoint__every_steps=1, batch__accumulate=2
)


def test_losses_are_those_of_the_cpu(tiny_dataset, tmp_path):
    host = run(tiny_dataset, SMOOTH, tmp_path)
    device = run(tiny_dataset, SMOOTH, tmp_path, device="cuda")
    for name in ("loss/cross_entropy", "loss/triplet", "loss/penalty"):
        np.testing.assert_allclose(device.losses(name), host.losses(name), rtol=2e-4)


def test_losses_of_a_compiled_run_are_those_of_an_eager_one(tiny_dataset, tmp_path):
    clipped = SMOOTH.replace(optimizer__clip_norm=1.0, batch__accumulate=2)
    eager = run(tiny_dataset, clipped, tmp_path, device="cuda")
    compiled = run(tiny_dataset, clipped.replace(compile="on"), tmp_path, device="cuda")
    for name in ("loss/cross_entropy", "loss/triplet", "loss/penalty"):
        np.testing.assert_allclose(compiled.losses(name), eager.losses(name), rtol=2e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_stays_close_to_float32(tiny_dataset, tmp_path, precision):
    exact = run(tiny_dataset, SMOOTH, tmp_path, device="cuda")
    rounded = run(tiny_dataset, SMOOTH.replace(precision=precision), tmp_path, device="cuda")
    np.testing.assert_allclose(rounded.losses(), exact.losses(), rtol=0.1)
    assert rounded.losses() != exact.losses()


@pytest.mark.parametrize("compile", ["off", "on"])
def test_resumed_run_ends_as_the_uninterrupted_one(tiny_dataset, tmp_path, compile):
    settings = EXACT.replace(compile=compile)
    whole = run(tiny_dataset, settings, tmp_path, device="cuda").checkpoints
    for step in (0, 4, 7):  # frozen, in the second phase, before its end
        again = run(tiny_dataset, settings, tmp_path, whole[step], device="cuda")
        assert state(again.checkpoints[-1]) == state(whole[-1])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_ranks_are_those_of_the_cpu_whatever_precision_training_has(metric):
    draw = np.random.default_rng(0)
    center = draw.standard_normal((60, 256), dtype=np.float32)
    pids = draw.integers(0, 60, 300), draw.integers(0, 60, 4000)
    query, gallery = (
        center[pid] + draw.standard_normal((len(pid), 256), dtype=np.float32) for pid in pids
    )
    gallery[1000:1200] = gallery[:200]  # ties
    labels = pids[0], draw.integers(0, 6, 300), pids[1], draw.integers(0, 6, 4000)
    host = rank(query, gallery, Labels(*labels), metric=metric)
    before = torch.get_float32_matmul_precision()
    for precision in ("high", "highest"):
        torch.set_float32_matmul_precision(precision)
        try:
            device = rank(query, gallery, Labels(*labels), metric=metric, device="cuda")
        finally:
            torch.set_float32_matmul_precision(before)
        np.testing.assert_array_equal(device.average_precision, host.average_precision)
        np.testing.assert_array_equal(device.cmc, host.cmc)


def test_penalty_and_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 7))
    found = []
    for device in ("cpu", "cuda"):
        network = network.to(device)
        regularizer = AdaptiveL2(network).to(device)
        for parameter in [*network.parameters(), *regularizer.parameters()]:
            parameter.grad = torch.zeros_like(parameter)
        regularizer.add_gradients()
        grads = [p.grad for p in [*network.parameters(), *regularizer.parameters()]]
        # Copies: the network takes its gradients along.
        found.append([value.to("cpu", copy=True) for value in (regularizer.last_penalty, *grads)])
    for host, device in zip(*found, strict=True):
        torch.testing.assert_close(device, host, rtol=1e-5, atol=1e-7)


def test_global_batch_norm_is_that_of_one_process_in_float64(monkeypatch):
    monkeypatch.setattr(batch_norm, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2.0))  # a rank of equals
    torch.manual_seed(0)
    image = torch.randn(4, 8, 6, 5, device="cuda").to(memory_format=torch.channels_last) + 100.0
    upstream = torch.randn_like(image)
    found = []
    for norm, dtype in (
        (batch_norm.GlobalBatchNorm(8), torch.float32),
        (nn.BatchNorm2d(8), torch.float64),
    ):
        norm, x = norm.to("cuda", dtype), image.to(dtype, copy=True).requires_grad_()
        output = norm(x)
        output.backward(upstream.to(output.dtype))
        assert x.grad is not None
        found.append([output.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), reference.double(), rtol=1e-4, atol=1e-4)
