"""Split a backbone into a shared trunk and its last stage, of which the network has two copies.

A backbone is one of torchvision's ResNets, or one of timm's models, `timm:NAME`. timm is imported
only for its own models. `split` names the families; METHOD, "Backbones", has them in a table.
"""

import difflib
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import Permute

from data_shards.errors import ConfigError, DataError
from reid_train.config import RESNETS, TIMM
from reid_train.model.batch_norm import GlobalBatchNorm, make_global
from reid_train.transforms import IMAGENET, Pixels

FAMILIES = (
    *("ResNet", "ConvNeXt", "EfficientNet", "MobileNetV3"),
    *("VisionTransformer", "SwinTransformer"),
)
DOUBLED_BLOCKS = 5  # a transformer's last fifth is doubled, as in ResNet-50 (3 of 16 blocks)


class Backbone(NamedTuple):
    """A backbone in two parts, `last(trunk(image))` is its feature map."""

    trunk: nn.Module
    last: nn.Module
    channels: int  # of the map
    pixels: Pixels  # what its weights were trained on
    prefix: str = ""  # before the names of the last stage's tensors in the backbone's state dict


def build_backbone(name: str, image: tuple[int, int], *, global_norm: bool) -> Backbone:
    """Return a backbone with initial weights from torch's global random state.

    Args:
        name: one of `RESNETS`, or `timm:NAME` with or without timm's tag of pretrained weights.
        image: height and width of its input, in pixels; position embeddings are made for it.
        global_norm: whether batch norm takes the statistics of all workers' images.

    Raises:
        ConfigError: there is no such backbone, it cannot be split, or the image does not fit it.
    """
    if name.startswith(TIMM):
        model = _timm_model(name, image)
        backbone = split(model, name, image)
        if global_norm:
            make_global(backbone.trunk)
            make_global(backbone.last)
        return backbone
    if name not in RESNETS:
        raise ConfigError(f"model: no backbone {name!r}; there are {', '.join(RESNETS)}, timm:NAME")
    norm = GlobalBatchNorm if global_norm else nn.BatchNorm2d
    source = getattr(resnet, name)(weights=None, norm_layer=norm)
    _keep_resolution(source.layer4)
    shared = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
    trunk = _sequence({part: getattr(source, part) for part in shared})
    return Backbone(trunk, source.layer4, source.fc.in_features, IMAGENET, "layer4.")


def split(model: Any, name: str, image: tuple[int, int]) -> Backbone:
    """Split one of timm's models; the trunk's and the last stage's tensors keep their names.

    The model itself becomes the trunk. Its last stage begins where it last halves the map, and has
    stride 1 there, except in a transformer.

    Raises:
        ConfigError: the model is of no family that can be split, or the image does not fit it.
    """
    channels, kept, more = model.num_features, -2, {}
    patch: Any = getattr(model, "patch_embed", None)
    family = _family(model)
    if family == "ResNet":
        last = {"layer4": model.layer4}
        kept = 3  # after the stem, counted as 0
    elif family == "ConvNeXt":
        norm = {"norm": getattr(model.head, "norm", nn.Identity())}  # for each position of the map
        last = {"stages": model.stages[-1:], "norm_pre": model.norm_pre, "head": _sequence(norm)}
        kept = len(model.stages) - 2
    elif family == "EfficientNet":
        kept, more = _last_downsampling(model.blocks, name), {"extra_blocks": True}
        last = {"blocks": model.blocks[kept:], "conv_head": model.conv_head, "bn2": model.bn2}
    elif family == "MobileNetV3":
        kept, more = _last_downsampling(model.blocks, name), {"extra_blocks": True}
        last = {"blocks": model.blocks[kept:]}
        channels = model.feature_info[-1]["num_chs"]
    elif family == "SwinTransformer":
        last = {"layers": model.layers[-1:], "norm": model.norm, "map": Permute([0, 3, 1, 2])}
        kept = len(model.layers) - 2
    elif family == "VisionTransformer":
        doubled = max(1, len(model.blocks) // DOUBLED_BLOCKS)
        tokens = _TokenMap(model.num_prefix_tokens, patch.grid_size)
        last = {"blocks": model.blocks[-doubled:], "norm": model.norm}
        last |= {"fc_norm": model.fc_norm, "map": tokens}
        kept = len(model.blocks) - doubled - 1
    else:
        raise ConfigError(
            f"model: {name} is a {type(model).__name__}, which cannot be split into a trunk and a "
            f"last stage; of timm's models those of {', '.join(FAMILIES)} can"
        )
    if patch is not None:
        _require_patches(image, patch.patch_size, name)
    _without_dropout(model)
    stage = _sequence(last)
    model.prune_intermediate_layers([kept], prune_norm=True, **more)
    if patch is None:
        _keep_resolution(stage)
    config = model.pretrained_cfg
    return Backbone(model, stage, channels, Pixels(tuple(config["mean"]), tuple(config["std"])))


def own_tensors(
    name: str, image: tuple[int, int], state: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Return the tensors of a state dict by the backbone's names, without its classifier.

    What timm converts for its models is converted: the names of the authors' own files, position
    embeddings and relative position tables of another image size.

    Raises:
        DataError: timm cannot convert them.
    """
    if not name.startswith(TIMM):
        return {key: value for key, value in state.items() if not key.startswith("fc.")}
    with torch.device("meta"):  # its shapes are all that is needed
        model = _timm_model(name, image)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        own = dict(state) if convert is None else convert(dict(state), model)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"weights: {source} does not fit {name}: {reason[0]}") from error
    return _split_tensors(model, name, image, own)


def pretrained_tensors(name: str, image: tuple[int, int]) -> dict[str, Tensor]:
    """Return timm's pretrained weights of one of its models, as `own_tensors` does.

    They come from the Hugging Face cache or the network.

    Raises:
        ConfigError: there are none, or they cannot be downloaded.
    """
    import timm

    config = timm.get_pretrained_cfg(name.removeprefix(TIMM))
    instead = (
        "give the path or s3:// URL of a file instead of 'imagenet', or 'none' to start from "
        "random weights"
    )
    if config is None or not config.has_weights:
        raise ConfigError(f"weights: timm has no pretrained weights of {name}: {instead}")
    try:
        model = _timm_model(name, image, pretrained=True)
    except (OSError, RuntimeError) as error:
        where = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"weights: those of {name} cannot be downloaded from {where} ({reason[0]}): fetch them "
            f"elsewhere, and {instead}"
        ) from error
    return _split_tensors(model, name, image, model.state_dict())


def _split_tensors(
    model: Any, name: str, image: tuple[int, int], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a state that the model's two parts have, and those unknown to it."""
    classifier = model.pretrained_cfg["classifier"]
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    heads = tuple(f"{part}." for part in names)
    left_out = set(model.state_dict())
    parts = split(model, name, image)
    left_out -= {*parts.trunk.state_dict(), *parts.last.state_dict()}
    return {k: v for k, v in state.items() if k not in left_out and not k.startswith(heads)}


def _timm_model(name: str, image: tuple[int, int], **options: Any) -> Any:
    """Return one of timm's models for an image size, with no classifier."""
    import timm

    short = name.removeprefix(TIMM)
    if not timm.is_model(short):
        close = difflib.get_close_matches(short, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(TIMM + c for c in close)}?" if close else ""
        raise ConfigError(f"model: timm {timm.__version__} has no model {short!r}. {hint}".rstrip())
    try:
        config = timm.get_pretrained_cfg(short)
    except RuntimeError:
        tags = [found for found in timm.list_models(pretrained=True) if _is_tag_of(found, short)]
        there = ", ".join(tags) or "none"
        raise ConfigError(
            f"model: timm has no weights {short!r}; of that model it has {there}"
        ) from None
    if config is not None and config.fixed_input_size:
        options["img_size"] = image
    return timm.create_model(short, num_classes=0, **options)


def _is_tag_of(found: str, name: str) -> bool:
    return found.partition(".")[0] == name.partition(".")[0]


def _family(model: nn.Module) -> str | None:
    """Return the one of timm's classes in `FAMILIES` that a model is, and not a subclass of it."""
    from timm import models
    from timm.layers.patch_embed import PatchEmbed

    if type(getattr(model, "patch_embed", None)) not in (type(None), PatchEmbed):
        return None  # a transformer behind a convolutional network
    return next((name for name in FAMILIES if type(model) is getattr(models, name)), None)


def _require_patches(image: tuple[int, int], patch: tuple[int, int], name: str) -> None:
    """Raise a `ConfigError` unless an image consists of whole patches."""
    if any(size % step for size, step in zip(image, patch, strict=True)):
        raise ConfigError(
            f"model: {name} cuts images into patches of {patch[0]} × {patch[1]} pixels, and "
            f"{image[0]} × {image[1]} is not a multiple: change --image.height or --image.width"
        )


def _without_dropout(model: nn.Module) -> None:
    """Turn dropout and stochastic depth off: a resumed run could not repeat what they drew."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        elif hasattr(layer, "drop_prob"):
            layer.drop_prob = 0.0  # type: ignore[assignment]


class _TokenMap(nn.Module):
    """Patch tokens as a map, without class and register tokens."""

    def __init__(self, prefix: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.prefix, self.grid = prefix, tuple(grid)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, C, H, W) of tokens (B, prefix + H·W, C)."""
        return tokens[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)


def _sequence(parts: Mapping[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def _last_downsampling(blocks: nn.Sequential, name: str) -> int:
    """Return the last of an EfficientNet's stages that halves the map."""
    halving = [number for number, stage in enumerate(blocks) if list(_strided(stage))]
    if not halving or halving[-1] == 0:
        raise ConfigError(f"model: {name} cannot be split: no stage after its first has a stride")
    return halving[-1]


def _strided(stage: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return (parent, name, layer) of a stage's layers with a stride."""
    return [
        (parent, name, layer)
        for parent in stage.modules()
        for name, layer in parent.named_children()
        if getattr(layer, "stride", 1) not in (1, (1, 1))
    ]


def _keep_resolution(stage: nn.Module) -> None:
    """Set a convolutional stage's strides to 1."""
    for parent, name, layer in _strided(stage):
        if isinstance(layer, nn.Conv2d):
            layer.stride = (1, 1)
        elif not list(layer.parameters()):  # a pooling layer, before a convolution without stride
            setattr(parent, name, nn.Identity())
