"""The losses against the authors' numbers, their properties, and two workers against one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run_workers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from reid_train.model.collectives import gather_with_gradient
from reid_train.training.losses import batch_hard_triplet, label_smoothing_cross_entropy

GOLDEN = Path(__file__).parents[2] / "golden"
WORLD = 2


def _golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def test_cross_entropy_matches_the_authors():
    golden = _golden("label_smoothing_ce")
    logits = torch.tensor(golden["logits"], requires_grad=True)
    loss = label_smoothing_cross_entropy(logits, torch.tensor(golden["label"]), 0.1)
    loss.backward()
    assert logits.grad is not None
    np.testing.assert_allclose(loss.item(), golden["mean_loss"], rtol=1e-6)
    np.testing.assert_allclose(logits.grad, golden["grad_logits"], rtol=1e-5, atol=1e-8)


def test_cross_entropy_of_each_sample_matches_the_authors():
    golden = _golden("label_smoothing_ce")
    for logits, label, expected in zip(
        torch.tensor(golden["logits"]),
        torch.tensor(golden["label"]),
        golden["per_sample_loss"],
        strict=True,
    ):
        loss = label_smoothing_cross_entropy(logits[None], label[None], 0.1)
        np.testing.assert_allclose(loss.item(), expected, rtol=1e-6)


def test_triplet_matches_the_authors():
    golden = _golden("batch_hard_triplet")
    embedding = torch.tensor(golden["embedding"], requires_grad=True)
    loss = batch_hard_triplet(embedding, torch.tensor(golden["pid"]))
    loss.backward()
    assert embedding.grad is not None
    np.testing.assert_allclose(loss.item(), golden["mean_loss"], rtol=1e-6)
    np.testing.assert_allclose(embedding.grad, golden["grad_embedding"], rtol=1e-5, atol=1e-8)


def test_triplet_of_each_anchor_matches_the_authors():
    golden = _golden("batch_hard_triplet")
    everyone, pid = torch.tensor(golden["embedding"]), torch.tensor(golden["pid"])
    losses = [
        batch_hard_triplet(everyone[i : i + 1], pid[i : i + 1], everyone, pid).item()
        for i in range(len(pid))
    ]
    np.testing.assert_allclose(losses, golden["per_anchor_loss"], rtol=1e-6)


def _naive_triplet(embedding: np.ndarray, pid: np.ndarray) -> float:
    losses = []
    for a, p in zip(embedding, pid, strict=True):
        distance = [np.sqrt(((a - b) ** 2).sum() + 1e-12) for b in embedding]
        positive = [d for d, q in zip(distance, pid, strict=True) if q == p]
        negative = [d for d, q in zip(distance, pid, strict=True) if q != p]
        hard = np.logaddexp(0.0, max(positive) - min(negative)) if negative else 0.0
        losses.append(hard)
    return float(np.mean(losses))


@given(st.data())
def test_triplet_equals_the_naive_search(data):
    count = data.draw(st.integers(1, 12))
    pid = np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    values = np.random.default_rng(data.draw(st.integers(0, 2**32))).normal(size=(count, 4))
    if data.draw(st.booleans()):
        values[-1] = values[0]  # a repeated image
    embedding = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    loss = batch_hard_triplet(embedding, torch.tensor(pid))
    loss.backward()
    assert embedding.grad is not None
    np.testing.assert_allclose(loss.item(), _naive_triplet(values, pid), rtol=1e-5, atol=1e-6)
    assert embedding.grad.isfinite().all()


def test_losses_are_float32_under_autocast():
    golden = _golden("batch_hard_triplet")
    embedding, pid = torch.tensor(golden["embedding"]), torch.tensor(golden["pid"])
    with torch.autocast("cpu", torch.bfloat16):
        triplet = batch_hard_triplet(embedding, pid)
        entropy = label_smoothing_cross_entropy(embedding.bfloat16(), pid)
    assert (triplet.dtype, entropy.dtype) == (torch.float32, torch.float32)
    np.testing.assert_allclose(triplet.item(), golden["mean_loss"], rtol=1e-6)


def _problem() -> tuple[torch.nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.nn.Linear(6, 4), torch.randn(8, 6), torch.tensor([0, 1, 1, 2, 2, 0, 3, 0])


def _worker(rank: int) -> dict[str, Tensor]:
    model, image, pid = _problem()
    parallel = DistributedDataParallel(model)
    image, pid = image.chunk(WORLD)[rank], pid.chunk(WORLD)[rank]
    embedding = parallel(image)
    loss = batch_hard_triplet(
        embedding, pid, gather_with_gradient(embedding), gather_with_gradient(pid)
    )
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}


def test_triplet_over_gathered_embeddings_has_the_gradient_of_one_process():
    workers = run_workers(_worker, WORLD)
    model, image, pid = _problem()
    loss = batch_hard_triplet(model(image), pid)
    loss.backward()
    torch.testing.assert_close(sum(worker["loss"] for worker in workers) / WORLD, loss.detach())
    for worker in workers:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(worker[name], parameter.grad)


def test_gathering_in_one_process_changes_nothing():
    tensor = torch.ones(2, 3)
    assert gather_with_gradient(tensor) is tensor


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_confident_right_answers_cost_only_the_smoothing(smoothing):
    logits = torch.full((1, 4), -30.0)
    logits[0, 2] = 30.0
    loss = label_smoothing_cross_entropy(logits, torch.tensor([2]), smoothing)
    np.testing.assert_allclose(loss.item(), 60.0 * smoothing * 3 / 4, atol=1e-5)
