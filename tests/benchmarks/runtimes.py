"""Images a second of a model in PyTorch and in ONNX Runtime, on the CPU.

    python tests/benchmarks/runtimes.py --model s3://bucket/runs/first
    python tests/benchmarks/runtimes.py --backbone resnet50 --size 256 128

The model is exported as ONNX. Both runtimes embed the same images in turn, batch after batch, as
`search`, `embed` and the service run them: PyTorch with the model's own precision, which is
bfloat16 where the CPU has it, and in float32; ONNX Runtime in float32. The figures are medians.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from reid_train.commands.export import compare
from reid_train.commands.runtime import open_runtime, weights_digest
from reid_train.config import ImageConfig, ModelConfig, TrainConfig
from reid_train.model import exported
from reid_train.model.embedder import CONFIG, WEIGHTS, Embedder
from reid_train.model.network import ReidNet
from reid_train.registry.load import fetched


def random_model(folder: Path, backbone: str, height: int, width: int) -> None:
    """Write a network with random weights as a checkpoint."""
    config = TrainConfig(
        recipe="test",
        image=ImageConfig(height=height, width=width),
        model=ModelConfig(backbone=backbone, weights="none"),
    )
    state = ReidNet.from_config(config, identities=2).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(config.to_json())


def export(model: Path, file: Path) -> Embedder:
    """Export a model with the facts that `open_runtime` needs, and check it."""
    embedder = Embedder.from_folder(model, "cpu")
    size, facts = embedder.config.image, {"weights": weights_digest(model)}
    numbers = {"height": size.height, "width": size.width, "dimensions": embedder.embedding_size}
    facts |= {name: str(n) for name, n in (numbers | {"batch": 32}).items()}
    exported.export(embedder, file, "fp32", facts)
    pixels = images(4, size.height, size.width)
    error = compare(embedder, exported.open_exported(file), list(pixels)).error
    print(f"the file differs from PyTorch in float32 by {error:.1e} of an embedding's length")
    return embedder


def images(count: int, height: int, width: int) -> np.ndarray:
    """Noise: (count, height, width, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def measured(
    runtimes: dict[str, Callable[[np.ndarray], np.ndarray]], pixels: np.ndarray, seconds: float
) -> dict[str, float]:
    """Images a second of each runtime, by the median of batches that take turns."""
    times: dict[str, list[float]] = {name: [] for name in runtimes}
    for run in runtimes.values():
        run(pixels)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in runtimes.items():
            began = time.perf_counter()
            run(pixels)
            times[name].append(time.perf_counter() - began)
    return {name: len(pixels) / float(np.median(found)) for name, found in times.items()}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", help="a checkpoint's or run's folder or s3:// URL")
    parser.add_argument("--backbone", default="resnet50", help="without --model, random weights")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 128], help="height and width")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=30, help="for each size of batch")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, file = Path(temporary), Path(temporary) / "model.onnx"
        if given.model is None:
            random_model(folder, given.backbone, *given.size)
        with fetched(given.model or str(folder), None) as model:
            embedder = export(model, file)
            ours = open_runtime(str(model), "cpu", None)
        theirs = open_runtime(str(file), "cpu", None)
    config = embedder.config
    size = f"{config.image.height} × {config.image.width}"
    mirror = ", with mirror images" if config.evaluation.mirror else ""
    print(f"{config.model.backbone}, {size}{mirror}, {torch.get_num_threads()} threads")
    runtimes = {"PyTorch": ours, "PyTorch, float32": embedder, "ONNX Runtime, float32": theirs}
    for batch in given.batches:
        found = measured(
            runtimes, images(batch, config.image.height, config.image.width), given.seconds
        )
        for name, speed in found.items():
            ratio = speed / found["PyTorch"]
            print(f"  batches of {batch:3}   {name:22} {speed:7.1f} images/s   {ratio:.2f}")


if __name__ == "__main__":
    main()
