"""The network: a backbone with two copies of its last stage, a global and a regional branch.

Ni, Fang, Huttunen, arXiv 2007.07875. On torchvision's ResNet, so that torchvision's ImageNet
weights fit, it differs from the authors' Keras model in three ways: a block's stride is in its 3×3
convolution and not in its first 1×1 ("v1.5"); convolutions have no bias, so there are fewer tensors
and fewer θ; batch norm in the backbone has ε = 1e-5 and momentum 0.1. `backbones.py` splits the
others.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from reid_train.model.backbones import build_backbone
from reid_train.model.batch_norm import GlobalBatchNorm
from reid_train.model.precision import full_precision

GEM_EXPONENT = 3.0  # at the start


class Output(NamedTuple):
    """Each objective head's output in training, in the order global, stripe 0, stripe 1, …"""

    pooled: list[Tensor]  # (B, D_i), within [0, 1]: input of the triplet loss
    logits: list[Tensor]  # (B, C)


class ObjectiveHead(nn.Module):
    """Pooling, batch norm, linear classifier without bias.

    The pooling is the average clipped to [0, 1], as in the paper, or GeM: (mean xᵖ)^(1/p) of what
    is positive, with a learnt p (Radenović, Tolias, Chum, TPAMI 2019).
    """

    def __init__(
        self, channels: int, identities: int, norm: type[nn.Module], *, gem: bool = False
    ) -> None:
        super().__init__()
        self.norm = norm(channels, eps=2e-5, momentum=0.01)
        self.classifier = nn.Linear(channels, identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)
        # p less its start, because L2 regularization draws every parameter to 0.
        self.exponent_offset = nn.Parameter(torch.zeros(1)) if gem else None

    def pool(self, features: Tensor) -> Tensor:
        """Return the pooled features (B, channels), float32, of a map (B, channels, H, W)."""
        if self.exponent_offset is None:
            return features.mean(dim=(2, 3), dtype=torch.float32).clamp(0.0, 1.0)
        exponent = (GEM_EXPONENT + self.exponent_offset).clamp(1.0, 6.0)  # or x ** p underflows
        powers = features.float().clamp(min=1e-6).pow(exponent)
        return powers.mean(dim=(2, 3)).pow(1 / exponent)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled feature (B, channels) and the logits (B, C), float32."""
        pooled = self.pool(features)
        with full_precision(pooled.device):  # bfloat16 would round logits to two or three digits
            return pooled, self.classifier(self.norm(pooled))


class ReidNet(nn.Module):
    """The paper's network for person re-identification.

    Args:
        backbone: a name that `build_backbone` knows.
        identities: C, number of training identities.
        image: height and width of the images, which transformers are made for.
        stripes: horizontal stripes of the regional branch; 0 leaves that branch out.
        pooling: of the heads, see `ObjectiveHead`.
        embedding: the pooled features, or those after batch norm (Luo et al., CVPRW 2019).
        embedding_size: length of the embedding, half of it the global branch's; None leaves the
            global branch all channels of the map, and the regional branch as many.
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
        pooling: Literal["average", "gem"] = "average",
        embedding: Literal["pooled", "bnneck"] = "pooled",
        embedding_size: int | None = None,
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
            whole = embedding_size or channels * (2 if stripes else 1)
            if not 0 <= stripes <= whole // 2:
                raise ConfigError(f"model: {stripes} stripes; 0 to {whole // 2} are possible")
            reduced = whole // 2 // max(stripes, 1)
            head = partial(
                ObjectiveHead, identities=identities, norm=head_norm, gem=pooling == "gem"
            )
            kept = whole - stripes * reduced if embedding_size else channels
            self.trunk = parts.trunk
            self.global_layer4 = parts.last  # "layer4" is the last stage of any backbone
            self.global_head = head(kept)
            self.regional_layer4 = deepcopy(parts.last) if stripes else None
            self.reductions = nn.ModuleList(
                nn.Conv2d(channels, reduced, kernel_size=3, padding=1) for _ in range(stripes)
            )
            for reduction in self.reductions:
                _keras_defaults(reduction)
            self.regional_heads = nn.ModuleList(head(reduced) for _ in range(stripes))
            self.global_reduction = None
            if embedding_size:
                self.global_reduction = _keras_defaults(nn.Conv2d(channels, kept, kernel_size=1))
        self.embedding_size = kept + stripes * reduced
        self.after_norm = embedding == "bnneck"
        self._backbone_frozen = False
        self.backbone, self.image, self.pixels = backbone, image, parts.pixels
        self._last_prefix = parts.prefix

    @classmethod
    def from_config(cls, config: TrainConfig, identities: int) -> Self:
        """Return the network of a configuration, without pretrained weights."""
        model = config.model
        return cls(
            model.backbone,
            identities,
            image=(config.image.height, config.image.width),
            stripes=model.stripes,
            pooling=model.pooling,
            embedding=model.embedding,
            embedding_size=model.embedding_size,
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
        """Return embeddings (B, D) float32: the features of all heads, concatenated.

        They are neither averaged with the mirror image's nor scaled to unit length.
        """
        parts = []
        for head, features in self._maps(image):
            pooled = head.pool(features)
            parts.append(head.norm(pooled) if self.after_norm else pooled)
        return torch.cat(parts, dim=1)

    def activation(self, image: Tensor) -> Tensor:
        """Return where the global branch responds: the norm of its map, (B, h, w) float32.

        What a head averages is large where this is large.
        """
        _, features = next(self._maps(image))
        return features.float().norm(dim=1)

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
        whole = self.global_layer4(shared)
        if self.global_reduction is not None:
            whole = self.global_reduction(whole).relu()
        yield self.global_head, whole
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


def _keras_defaults(convolution: nn.Module) -> nn.Module:
    """Set the initial weights that the authors use for reductions."""
    nn.init.xavier_uniform_(convolution.get_parameter("weight"))
    nn.init.zeros_(convolution.get_parameter("bias"))
    return convolution
