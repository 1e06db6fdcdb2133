"""A narrow ResNet-18 in every process of a Ray cluster, so that checkpoints take 5 MB, not 130."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "unit"))


def install() -> None:
    """Ray's hook for each worker process, and for this one."""
    from tiny import narrow_resnet18
    from torchvision.models import resnet

    resnet.resnet18 = narrow_resnet18  # type: ignore[assignment]
