"""Copies to a device that run late: no batch is overwritten before it has been read."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from data_shards.loading.loader import Batch
from data_shards.loading.on_device import on_device

CPU = torch.device("cpu")
LATE = 3  # batches by which a copy is late


class Loader:
    """Hands out batches in slots, and fills a slot again as soon as its batch is gone."""

    def __init__(self, batches: int) -> None:
        self.batches, self.slots = batches, 0

    def __iter__(self) -> Iterator[Batch]:
        free: list[Tensor] = []
        for number in range(self.batches):
            if not free:
                free.append(torch.empty(2, 4, 3, 3, dtype=torch.uint8))
                self.slots += 1
            image = free.pop().fill_(number)
            numbers = torch.full((2,), number)
            batch = Batch(image, numbers, numbers)
            weakref.finalize(batch, free.append, image)
            yield batch
            del batch


class LateStream:
    """Stands in for a GPU's stream of copies: it reads a tensor batches after it was told to."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Tensor, Tensor]] = deque()
        self.asked = 0

    def copy(self, tensors):
        copies = [torch.zeros_like(tensor) for tensor in tensors]
        due, done = self.asked + LATE, []

        def is_read() -> bool:
            self.asked += 1
            if self.asked >= due and not done:
                self.run(len(tensors))
                done.append(True)
            return bool(done)

        # Views, so that nothing here keeps the batch.
        self.queue += zip(copies, [tensor.detach() for tensor in tensors], strict=True)
        return copies, is_read

    def run(self, count: int) -> None:
        for _ in range(count):
            copy, source = self.queue.popleft()
            copy.copy_(source)


def _seen(batches: Iterator[Batch], stream: LateStream) -> list[tuple[int, int]]:
    """Values of all images and labels on the device, once all copies have run."""
    found = [(batch.image, batch.label) for batch in batches]
    stream.run(len(stream.queue))
    return [(int(image.float().mean()), int(label[0])) for image, label in found]


def test_a_late_copy_reads_the_batch_and_not_the_one_after():
    loader, stream = Loader(12), LateStream()
    found = _seen(on_device(loader, CPU, stream), stream)  # type: ignore[arg-type]
    assert found == [(number, number) for number in range(12)]
    assert loader.slots <= LATE + 3, "a batch that has been read is given back"


def test_the_late_copy_notices_a_batch_that_is_given_back_too_early():
    def careless(batches, stream) -> Iterator[Batch]:
        for batch in batches:
            (image, label), _ = stream.copy((batch.image, batch.label))
            yield Batch(image, label, label)

    stream = LateStream()
    assert _seen(careless(Loader(12), stream), stream) != [(n, n) for n in range(12)]


def test_batches_of_a_cpu_are_not_copied():
    for batch, given in zip(on_device(Loader(3), CPU), Loader(3), strict=True):
        assert torch.equal(batch.image, given.image)
        assert batch.label is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_those_of_the_loader():
    stream, found = None, []
    for batch in on_device(Loader(50), torch.device("cuda"), stream):
        torch.cuda._sleep(1_000_000)  # the GPU is busy with the batch before
        found.append((batch.image.float().mean(), batch.label[0]))
    values = [(int(image), int(label)) for image, label in found]
    assert values == [(number, number) for number in range(50)]
