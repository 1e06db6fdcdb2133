"""The network: a backbone with two copies of its last stage, a global and a regional branch.

Ni, Fang, Huttunen, arXiv 2007.07875. On torchvision's ResNet, so that torchvision's ImageNet
weights fit, it differs from the authors' Keras model in three ways: a block's stride is in its 3×3
convolution and not in its first 1×1 ("v1.5"); convolutions have no bias, so there are fewer tensors
and fewer θ; batch norm in the backbone has ε = 1e-5 and momentum 0.1. `backbones.py` splits the
others.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from reid_train.model.backbones import build_backbone
from reid_train.model.batch_norm import GlobalBatchNorm


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
        backbone: a name that `build_backbone` knows.
        identities: C, number of training identities.
        image: height and width of the images, which transformers are made for.
        stripes: horizontal stripes of the regional branch; 0 leaves that branch out.
        batch_norm: in training, "global" normalizes by the statistics of all workers' images,
            "local" by those of each worker's own.
        seed: decides the initial weights, independently of torch's global random state.

    Raises:
        ConfigError: the backbone is unknown or does not fit, or a number is out of range.
    """

    def __init__(
        self,
        backbone: str,
        identities: int,
        *,
        image: tuple[int, int] = (384, 128),
        stripes: int = 2,
        batch_norm: Literal["global", "local"] = "local",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if identities < 2:
            raise ConfigError(f"model: {identities} identities; a classifier needs two or more")
        is_global = batch_norm == "global"
        head_norm = GlobalBatchNorm if is_global else nn.BatchNorm1d
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            parts = build_backbone(backbone, image, global_norm=is_global)
            channels = parts.channels
            if not 0 <= stripes <= channels:
                raise ConfigError(f"model: {stripes} stripes; 0 to {channels} are possible")
            self.trunk = parts.trunk
            self.global_layer4 = parts.last  # "layer4" is the last stage of any backbone
            self.global_head = ObjectiveHead(channels, identities, head_norm)
            self.regional_layer4 = deepcopy(parts.last) if stripes else None
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
        self.backbone, self.image, self.pixels = backbone, image, parts.pixels
        self._last_prefix = parts.prefix
        self.embedding_size = channels + stripes * reduced
        self._backbone_frozen = False

    @classmethod
    def from_config(cls, config: TrainConfig, identities: int) -> Self:
        """Return the network of a configuration, without pretrained weights."""
        model = config.model
        return cls(
            model.backbone,
            identities,
            image=(config.image.height, config.image.width),
            stripes=model.stripes,
            batch_norm=model.batch_norm,
            seed=config.seed,
        )

    def forward(self, image: Tensor) -> Output:
        """Return each head's output for images (B, 3, H, W) from `transforms.normalize`.

        `self.pixels` is how it expects them to be normalized.
        """
        pooled, logits = zip(*(head(x) for head, x in self._maps(image)), strict=True)
        return Output(list(pooled), list(logits))

    def embed(self, image: Tensor) -> Tensor:
        """Return embeddings (B, D) float32: the pooled features of all heads, concatenated.

        They are neither averaged with the mirror image's nor scaled to unit length.
        """
        return torch.cat([head.pool(x) for head, x in self._maps(image)], dim=1)

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Set the backbone, with both last stages; `state` has exactly the `backbone_shapes`."""
        self.trunk.load_state_dict({name: state[name] for name in self.trunk.state_dict()})
        for stage in self.backbone_modules()[1:]:
            stage.load_state_dict({k: state[self._last_prefix + k] for k in stage.state_dict()})

    def backbone_shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the backbone's tensors, by their names in the whole backbone."""
        last = {f"{self._last_prefix}{k}": v for k, v in self.global_layer4.state_dict().items()}
        return {k: v.shape for k, v in (self.trunk.state_dict() | last).items()}

    def backbone_modules(self) -> list[nn.Module]:
        """Return the parts that come from the pretrained backbone."""
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
