"""Copy batches to a GPU beside its computing, from memory that the loader reuses."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data_shards.loading.loader import Batch


class SideStream:
    """A stream of copies to a GPU beside the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], bool]]:
        """Begin to copy tensors of the host; what computes on the copies later waits for them.

        Return the copies, and a function that tells whether the tensors have been read. Until
        then they must not change.
        """
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            pinned = [tensor.pin_memory() for tensor in tensors]
            copies = [tensor.to(self._device, non_blocking=True) for tensor in pinned]
            copied = self._stream.record_event()
        computing.wait_event(copied)
        for copy in copies:
            # Their memory is the side stream's: it must not reuse it before they are used up.
            copy.record_stream(computing)
        return copies, copied.query


def on_device(
    batches: Iterable[Batch], device: torch.device, stream: SideStream | None = None
) -> Iterator[Batch]:
    """Yield the same batches with images and labels on a device, without waiting for it.

    The copy to a GPU runs while the GPU still computes on the batch before. A batch is kept until
    it has been read, because the loader fills its memory again as soon as nothing refers to it.

    Args:
        batches: from the loader.
        device: where to.
        stream: copies them; None takes a new one of the device if that is a GPU.
    """
    if stream is None and device.type == "cuda":
        stream = SideStream(device)
    reading: deque[tuple[Callable[[], bool], Batch]] = deque()
    for batch in batches:
        if stream is None:
            image, label = batch.image.to(device), batch.label.to(device)
        else:
            while reading and reading[0][0]():
                reading.popleft()
            (image, label), is_read = stream.copy((batch.image, batch.label))
            reading.append((is_read, batch))
        yield replace(batch, image=image, label=label)
        del image, label
