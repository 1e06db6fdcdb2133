"""A trained network as one graph, from uint8 images of any size to embeddings: for other programs.

The graph holds all that `Embedder` does: resize, scale, average with the mirror image. OpenCV
resizes in integers, and the graph in float32. So pixels may differ by 1 of 255 if a photo is not of
the network's size, and are the same if it is.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from data_shards.errors import ConfigError, DataError
from reid_train.model.embedder import Embedder

Precision = Literal["fp32", "fp16"]
ONNX = ".onnx"  # the suffix of an ONNX file; any other is an exported program of PyTorch
OPSET = 18
INPUT, OUTPUT = "images", "embeddings"


class ExportedNet(nn.Module):
    """Images (N, H, W, 3) uint8, RGB, to embeddings (N, D) float32, as `Embedder` computes them."""

    scale: Tensor  # (3, 1, 1)
    shift: Tensor

    def __init__(self, embedder: Embedder, precision: Precision) -> None:
        super().__init__()
        network = deepcopy(embedder.network).cpu().to(memory_format=torch.contiguous_format)
        self.dtype = torch.float32
        if precision == "fp16":  # the heads stay in float32, as under autocast
            self.dtype = torch.float16
            parts = network.trunk, network.global_layer4, network.regional_layer4
            for part in (*parts, network.reductions, network.global_reduction):
                if part is not None:
                    part.half()
        self.network = network.eval()
        self.size = embedder.config.image.height, embedder.config.image.width
        self.mirror = embedder.config.evaluation.mirror
        mean, std = (torch.tensor(values)[:, None, None] for values in network.pixels)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images of any one size."""
        pixels = (self.resized(images) * self.scale + self.shift).to(self.dtype)
        embedding = self.network.embed(pixels).float()
        if self.mirror:
            embedding = (embedding + self.network.embed(pixels.flip(3)).float()) / 2
        return embedding

    def resized(self, images: Tensor) -> Tensor:
        """Resize as `embedder.resize` does: (N, 3, height, width) float32, whole numbers.

        A product with the weights of the pixels of each row and column: the same operations for
        every size, so that the graph has no branch.
        """
        pixels = images.permute(0, 3, 1, 2).float()
        rows = torch.arange(images.shape[1], dtype=torch.float32, device=images.device)
        columns = torch.arange(images.shape[2], dtype=torch.float32, device=images.device)
        height, width = self.size
        # Counted from the tensor: a comparison of shapes would fix them in the graph.
        n_rows, n_columns = (torch.ones_like(positions).sum() for positions in (rows, columns))
        area = (n_rows > 2 * height) & (n_columns > 2 * width)
        left = _weights(rows, n_rows, height, area)
        right = _weights(columns, n_columns, width, area)
        return (left @ pixels @ right.T).round().clamp(0, 255)


def _weights(position: Tensor, count: Tensor, size: int, area: Tensor) -> Tensor:
    """How much each of `count` pixels counts in each of `size`: (size, count) float32.

    By the area that they share if `area` is true, else bilinear.
    """
    target = torch.arange(size, dtype=torch.float32, device=position.device)[:, None]
    step = count / size
    end = torch.minimum((target + 1) * step, position + 1)
    shared = (end - torch.maximum(target * step, position)).clamp(min=0) / step
    centre = torch.minimum(((target + 0.5) * step - 0.5).clamp(min=0), count - 1)
    return torch.where(area, shared, (1 - (centre - position).abs()).clamp(min=0))


def export(embedder: Embedder, path: Path, precision: Precision, facts: dict[str, str]) -> None:
    """Write the graph for any number and size of images; `facts` become the file's metadata.

    The suffix of `path` tells the format: `.onnx`, or `.pt2` for `torch.export.load`.

    Raises:
        ConfigError: what ONNX needs is not installed.
        DataError: the network cannot be exported.
    """
    if path.suffix == ONNX:
        require_onnx()
    network = ExportedNet(embedder, precision).eval()
    # 2 and more of each: torch.export takes 0 and 1 for constants.
    example = torch.zeros(2, 64, 48, 3, dtype=torch.uint8)
    auto = torch.export.Dim.AUTO
    dynamic = ({0: auto, 1: auto, 2: auto},)
    try:
        with torch.no_grad():
            program = torch.export.export(network, (example,), dynamic_shapes=dynamic)
        if path.suffix == ONNX:
            _write_onnx(program, path, facts)
        else:
            torch.export.save(program, path, extra_files=facts)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"this network cannot be exported as {path.suffix}: {reason}") from error


def _write_onnx(program: Any, path: Path, facts: dict[str, str]) -> None:
    import onnx

    made = torch.onnx.export(
        program,
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert made is not None
    model = made.model_proto
    # Traces of Python code, which tell of the machine that exported it.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def require_onnx() -> None:
    """Raise `ConfigError` if the packages of the extra `export` are not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"ONNX needs the package {error.name}: pip install -e '.[export]'"
        ) from None


def open_onnx(path: Path, device: str) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, str]]:
    """Open an exported ONNX file; return a function from images to embeddings, and its facts.

    Raises:
        ConfigError: ONNX Runtime is not installed, or has no such device.
        DataError: the file is not one that `export` wrote.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError(
            "an ONNX file needs the package onnxruntime: pip install -e '.[export]'"
        ) from None
    providers = [name for name in ("CUDAExecutionProvider",) if device != "cpu"]
    providers = [name for name in providers if name in onnxruntime.get_available_providers()]
    if device == "cuda" and not providers:
        raise ConfigError("this ONNX Runtime cannot use a GPU: install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, [*providers, "CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path} is not a whole ONNX file: {reason}") from error
    facts = dict(session.get_modelmeta().custom_metadata_map)
    if not {"height", "width", "batch", "dimensions", "weights"} <= facts.keys():
        raise DataError(f"{path} was not written by `reid_train export`: it has no facts")

    def run(images: np.ndarray) -> np.ndarray:
        return np.asarray(session.run([OUTPUT], {INPUT: images})[0])

    return run, facts


def open_exported(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Open an exported file of either format on the CPU: a function from images to embeddings."""
    if path.suffix == ONNX:
        return open_onnx(path, "cpu")[0]
    network = torch.export.load(path).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(images)).numpy()

    return run
