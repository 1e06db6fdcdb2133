"""The network: a ResNet with two copies of its last stage, a global and a regional branch.

Ni, Fang, Huttunen, arXiv 2007.07875, on torchvision's ResNet, so that torchvision's ImageNet
weights fit. It differs from the authors' Keras model in three ways: a block's stride is in its 3×3
convolution and not in its first 1×1 ("v1.5"); convolutions have no bias, so there are fewer tensors
and fewer θ; batch norm in the backbone has ε = 1e-5 and momentum 0.1.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from data_shards.errors import ConfigError
from reid_train.model.batch_norm import GlobalBatchNorm

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


class Output(NamedTuple):
    """Each objective head's output in training, in the order global, stripe 0, stripe 1, …"""

    pooled: list[Tensor]  # (B, D_i), within [0, 1]: input of the triplet loss
    logits: list[Tensor]  # (B, C)


class ObjectiveHead(nn.Module):
    """Global average pooling, clip to [0, 1], batch norm, linear classifier without bias."""

    def __init__(self, channels: int, identities: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm = norm(channels, eps=2e-5, momentum=0.01)
        self.classifier = nn.Linear(channels, identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def pool(self, features: Tensor) -> Tensor:
        """Return the pooled features (B, channels), float32, of a map (B, channels, H, W)."""
        return features.mean(dim=(2, 3), dtype=torch.float32).clamp(0.0, 1.0)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled feature (B, channels) and the logits (B, C)."""
        pooled = self.pool(features)
        return pooled, self.classifier(self.norm(pooled))


class ReidNet(nn.Module):
    """The paper's network for person re-identification.

    Args:
        backbone: one of `BACKBONES`.
        identities: C, number of training identities.
        stripes: horizontal stripes of the regional branch; 0 leaves that branch out.
        batch_norm: in training, "global" normalizes by the statistics of all workers' images,
            "local" by those of each worker's own.
        seed: decides the initial weights, independently of torch's global random state.

    Raises:
        ConfigError: the backbone is unknown or a number is out of range.
    """

    def __init__(
        self,
        backbone: str,
        identities: int,
        *,
        stripes: int = 2,
        batch_norm: Literal["global", "local"] = "local",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ConfigError(f"model: no backbone {backbone!r}; there are {', '.join(BACKBONES)}")
        if identities < 2:
            raise ConfigError(f"model: {identities} identities; a classifier needs two or more")
        is_global = batch_norm == "global"
        norm = GlobalBatchNorm if is_global else nn.BatchNorm2d
        head_norm = GlobalBatchNorm if is_global else nn.BatchNorm1d
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            source = getattr(resnet, backbone)(weights=None, norm_layer=norm)
            channels = source.fc.in_features
            if not 0 <= stripes <= channels:
                raise ConfigError(f"model: {stripes} stripes; 0 to {channels} are possible")
            for module in source.layer4.modules():
                if isinstance(module, nn.Conv2d):  # the map keeps the resolution of its input
                    module.stride = (1, 1)
            shared = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
            self.trunk = nn.Sequential(OrderedDict((n, getattr(source, n)) for n in shared))
            self.global_layer4 = source.layer4
            self.global_head = ObjectiveHead(channels, identities, head_norm)
            self.regional_layer4 = deepcopy(source.layer4) if stripes else None
            reduced = channels // max(stripes, 1)
            self.reductions = nn.ModuleList(
                nn.Conv2d(channels, reduced, kernel_size=3, padding=1) for _ in range(stripes)
            )
            for reduction in self.reductions:  # the authors use Keras's defaults
                nn.init.xavier_uniform_(reduction.get_parameter("weight"))
                nn.init.zeros_(reduction.get_parameter("bias"))
            self.regional_heads = nn.ModuleList(
                ObjectiveHead(reduced, identities, head_norm) for _ in range(stripes)
            )
        self.backbone = backbone
        self.embedding_size = channels + stripes * reduced
        self._backbone_frozen = False

    def forward(self, image: Tensor) -> Output:
        """Return each head's output for images (B, 3, H, W) from `transforms.normalize`."""
        pooled, logits = zip(*(head(x) for head, x in self._maps(image)), strict=True)
        return Output(list(pooled), list(logits))

    def embed(self, image: Tensor) -> Tensor:
        """Return embeddings (B, D) float32: the pooled features of all heads, concatenated.

        They are neither averaged with the mirror image's nor scaled to unit length.
        """
        return torch.cat([head.pool(x) for head, x in self._maps(image)], dim=1)

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Set the backbone, with both last stages; `state` has exactly the `backbone_shapes`."""
        last = {name: value for name, value in state.items() if name.startswith("layer4.")}
        self.trunk.load_state_dict({k: v for k, v in state.items() if k not in last})
        for stage in self.backbone_modules()[1:]:
            stage.load_state_dict({k.removeprefix("layer4."): v for k, v in last.items()})

    def backbone_shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the backbone's tensors, by their names in torchvision's ResNet."""
        last = {f"layer4.{k}": v.shape for k, v in self.global_layer4.state_dict().items()}
        return {k: v.shape for k, v in self.trunk.state_dict().items()} | last

    def backbone_modules(self) -> list[nn.Module]:
        """Return the parts that come from the pretrained ResNet."""
        parts = (self.trunk, self.global_layer4, self.regional_layer4)
        return [part for part in parts if part is not None]

    def freeze_backbone(self, frozen: bool) -> None:
        """Freeze or unfreeze the backbone.

        A frozen backbone's batch norm normalizes by its running statistics and does not update
        them, as in Keras where a layer has `trainable = False`.
        """
        self._backbone_frozen = frozen
        for part in self.backbone_modules():
            part.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        for part in self.backbone_modules():
            part.train(mode and not self._backbone_frozen)
        return self

    def _maps(self, image: Tensor) -> Iterator[tuple[ObjectiveHead, Tensor]]:
        """Yield each objective head with its input, a feature map (B, D_i, H, W)."""
        shared = self.trunk(image)
        yield self.global_head, self.global_layer4(shared)
        if self.regional_layer4 is None:
            return
        regional = self.regional_layer4(shared)
        count = len(self.reductions)
        height = regional.shape[2] // count
        if height == 0:
            raise ConfigError(
                f"model: images {image.shape[2]} pixels high give a feature map of "
                f"{regional.shape[2]} rows for {count} stripes: use higher images or fewer stripes"
            )
        parts = zip(self.regional_heads, self.reductions, strict=True)
        for i, (head, reduction) in enumerate(parts):
            end = (i + 1) * height if i + 1 < count else regional.shape[2]
            stripe = regional[:, :, i * height : end]
            yield head, reduction(stripe).relu()  # pyright: ignore[reportReturnType]
