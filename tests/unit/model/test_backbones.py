"""Backbones of timm: how they are split, and which weights they take."""

from __future__ import annotations

from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

from data_shards.errors import ConfigError, DataError
from reid_train.model.batch_norm import GlobalBatchNorm
from reid_train.model.network import ReidNet
from reid_train.model.pretrained import load_backbone
from reid_train.model.tracked_parameters import TrackedParameters

SIZE = (64, 32)
REL_POS = "layers.0.blocks.0.attn.relative_position_bias_table"
MAPS = {  # name to the map of a 64 × 32 image: channels, height, width
    "timm:test_resnet": (96, 4, 2),
    "timm:resnet18d": (512, 4, 2),
    "timm:test_convnext": (64, 3, 1),
    "timm:convnextv2_atto": (320, 3, 1),
    "timm:test_efficientnet": (256, 4, 2),
    "timm:tf_efficientnet_lite0": (1280, 4, 2),
    "timm:mobilenetv3_small_050": (288, 4, 2),
    "timm:test_vit": (64, 4, 2),
    "timm:vit_xsmall_patch16_clip_224": (256, 4, 2),
    "timm:vit_small_patch16_224.dino": (384, 4, 2),
    "timm:swin_tiny_patch4_window7_224": (768, 2, 1),
}


def network(name: str, image: tuple[int, int] = SIZE, **options) -> ReidNet:
    return ReidNet(name, 5, image=image, **options)


def picture(count: int = 2, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


def save_original(name: str, path, **options) -> dict[str, torch.Tensor]:
    """Save the weights of timm's whole model, with its classifier."""
    state = timm.create_model(name.removeprefix("timm:"), **options).state_dict()
    safetensors.torch.save_file(state, path)
    return state


@pytest.mark.parametrize("name", MAPS)
def test_each_family_gives_a_map_and_a_gradient_to_every_tensor(name):
    model = network(name).train()
    maps = []
    for stage in (model.global_layer4, model.regional_layer4):
        stage.register_forward_hook(lambda module, inputs, out: maps.append(tuple(out.shape[1:])))
    sum(logits.square().sum() for logits in model(picture()).logits).backward()
    assert maps == [MAPS[name]] * 2
    assert not [name for name, weight in model.named_parameters() if weight.grad is None]


def test_unsplit_and_split_compute_the_same_features(tmp_path):
    source = timm.create_model("test_vit", img_size=SIZE).eval()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "vit.safetensors")
    model = network("timm:test_vit").eval()
    load_backbone(model, str(tmp_path / "vit.safetensors"))
    with torch.no_grad():
        tokens = source.forward_features(picture())
        found = model.global_layer4(model.trunk(picture()))
    expected = tokens[:, source.num_prefix_tokens :].transpose(1, 2).reshape(found.shape)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["timm:tf_efficientnet_lite0", "timm:mobilenetv3_small_050"])
def test_weights_of_the_whole_model_load_into_both_last_stages(tmp_path, name):
    state = save_original(name, tmp_path / "whole.safetensors")
    model = network(name)
    load_backbone(model, str(tmp_path / "whole.safetensors"))
    for part in model.backbone_modules():
        assert all(torch.equal(value, state[key]) for key, value in part.state_dict().items())


def resampled(embedding: torch.Tensor, prefix: int, grid: tuple[int, int]) -> torch.Tensor:
    return resample_abs_pos_embed(embedding, new_size=list(grid), num_prefix_tokens=prefix)


def test_dinos_own_checkpoint_loads_with_its_position_embeddings_resampled(tmp_path):
    source = timm.create_model("test_vit", num_classes=0).state_dict()  # of 160 × 160 pixels
    teacher = {f"backbone.{name}": value for name, value in source.items()}
    teacher |= {"head.mlp.0.weight": torch.zeros(2), "head.last_layer.weight_g": torch.zeros(2)}
    torch.save({"student": {}, "teacher": teacher, "epoch": 3}, tmp_path / "dino.pth")
    model = network("timm:test_vit")
    load_backbone(model, str(tmp_path / "dino.pth"))
    assert torch.equal(model.trunk.pos_embed, resampled(source["pos_embed"], 1, (4, 2)))
    assert torch.equal(model.trunk.cls_token, source["cls_token"])


def test_timms_weights_are_converted_once(tmp_path):
    source = save_original("timm:test_vit", tmp_path / "vit.safetensors")
    size = (400, 64)  # as many patches as in 160 × 160 pixels
    create, downloaded = timm.create_model, {"file": str(tmp_path / "vit.safetensors")}
    model = network("timm:test_vit", size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", partial(create, pretrained_cfg_overlay=downloaded))
        load_backbone(model, "imagenet")
    assert torch.equal(model.trunk.pos_embed, resampled(source["pos_embed"], 1, (25, 4)))
    assert torch.equal(model.global_layer4.norm.weight, source["norm.weight"])


CLIP_NAMES = (  # timm's to the authors'
    ("patch_embed.proj", "conv1"),
    ("pos_embed", "positional_embedding"),
    ("cls_token", "class_embedding"),
    ("norm_pre", "ln_pre"),
    ("blocks.", "transformer.resblocks."),
    (".norm", ".ln_"),
    ("norm.", "ln_post."),
    ("qkv.", "in_proj_"),
    ("attn.proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


def test_clips_own_checkpoint_loads_without_its_text_and_projection(tmp_path):
    name = "vit_xsmall_patch16_clip_224"
    source = timm.create_model(name, num_classes=0).state_dict()
    state = {"logit_scale": torch.zeros(()), "ln_final.weight": torch.zeros(2)}
    for key, value in source.items():
        for ours, theirs in CLIP_NAMES:
            key = key.replace(ours, theirs)
        flat = {"positional_embedding": value[0], "class_embedding": value.flatten()}
        state[f"visual.{key}"] = flat.get(key, value)
    state["visual.proj"] = torch.zeros(256, 16)
    torch.save(state, tmp_path / "clip.pt")
    model = network(f"timm:{name}")
    load_backbone(model, str(tmp_path / "clip.pt"))
    assert torch.equal(model.trunk.pos_embed, resampled(source["pos_embed"], 1, (4, 2)))
    for stage in (model.global_layer4, model.regional_layer4):
        assert all(torch.equal(value, source[key]) for key, value in stage.state_dict().items())


def test_swins_position_tables_are_resized_to_its_windows(tmp_path):
    name = "timm:swin_tiny_patch4_window7_224"
    narrow = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    source = save_original(name, tmp_path / "swin.safetensors", **narrow)
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **more: create(name, **narrow, **more))
        model = network(name)
        load_backbone(model, str(tmp_path / "swin.safetensors"))
    assert source[REL_POS].shape == (13 * 13, 1)
    assert dict(model.trunk.named_parameters())[REL_POS].shape == (13 * 13, 1)
    table = "layers.3.blocks.0.attn.relative_position_bias_table"
    assert source[table].shape == (13 * 13, 2)
    resized = model.global_layer4.state_dict()[table]
    assert resized.shape == (3 * 1, 2)  # a window of 2 × 1
    middle = 6 * 13 + 6  # of a token and itself
    torch.testing.assert_close(resized, source[table][[middle - 13, middle, middle + 13]])


def test_batch_norm_becomes_global_with_its_own_settings_and_activation():
    local, shared = (
        network("timm:tf_mobilenetv3_small_minimal_100", batch_norm=kind)
        for kind in ("local", "global")
    )
    norms = [m for m in shared.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert all(isinstance(norm, GlobalBatchNorm) for norm in norms)
    assert {(m.eps, m.momentum) for m in shared.trunk.modules() if m in norms} == {(1e-3, 0.1)}
    assert local.state_dict().keys() == shared.state_dict().keys()
    for mode in (True, False):
        outputs = [model.train(mode)(picture()).pooled for model in (local, shared)]
        for one, other in zip(*outputs, strict=True):
            torch.testing.assert_close(one, other)


def test_images_are_scaled_as_the_weights_expect():
    assert network("timm:tf_efficientnet_lite0").pixels == ((0.5,) * 3, (0.5,) * 3)
    assert network("resnet18").pixels == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("name", "tensor", "kind"),
    [
        ("test_vit2", "pos_embed", "kernel"),
        ("test_vit2", "reg_token", "kernel"),
        ("test_vit2", "blocks.0.attn.qkv.bias", "bias"),
        ("test_vit2", "blocks.0.ls1.gamma", "gamma"),
        ("test_vit2", "blocks.0.norm1.weight", "gamma"),
        ("test_vit2", "blocks.0.norm1.bias", "beta"),
        ("test_vit", "cls_token", "kernel"),
        ("convnextv2_atto", "stages.0.blocks.0.mlp.grn.weight", "gamma"),
        ("convnextv2_atto", "stages.0.blocks.0.mlp.grn.bias", "beta"),
        ("convnextv2_atto", "stem.1.weight", "gamma"),
        ("convnext_atto", "stages.0.blocks.0.gamma", "gamma"),
        ("convnext_atto_rms", "stem.1.weight", "gamma"),
        ("swin_tiny_patch4_window7_224", REL_POS, "bias"),
        ("tf_efficientnet_lite0", "bn1.weight", "gamma"),
        ("tf_efficientnet_lite0", "bn1.bias", "beta"),
    ],
)
def test_kinds_of_tensors_follow_what_they_do(name, tensor, kind):
    with torch.device("meta"):
        tracked = TrackedParameters(timm.create_model(name), ())
    assert dict(zip(tracked.names, tracked.kinds, strict=True))[tensor] == kind


def test_a_linear_layer_named_after_a_norm_has_a_kernel():
    class NormLinear(nn.Linear):
        pass

    assert TrackedParameters(NormLinear(2, 3), ()).kinds == ("kernel", "bias")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:efficientnet_lite", "did you mean timm:efficientnet_lite"),
        ("timm:hf-hub:timm/resnet18", "no model"),
        ("timm:test_vit.in22k", "test_vit.r160_in1k"),
        ("timm:vgg11", "VGG, which cannot be split"),
        ("timm:deit_tiny_distilled_patch16_224", "VisionTransformerDistilled, which cannot"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_named(name, message):
    with pytest.raises(ConfigError, match=message):
        network(name)


def test_images_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(ConfigError, match="patches of 16 × 16 pixels, and 72 × 32"):
        network("timm:test_vit", (72, 32))


def test_weights_of_another_model_are_refused(tmp_path):
    save_original("timm:test_vit2", tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="does not fit the backbone"):
        load_backbone(network("timm:test_vit"), str(tmp_path / "other.safetensors"))


def test_weights_that_cannot_be_downloaded_name_their_place(monkeypatch):
    def offline(*arguments, **options):
        raise OSError("cannot reach the hub")

    model = network("timm:test_vit")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"huggingface.co/timm/test_vit.r160_in1k \(cannot reach"):
        load_backbone(model, "imagenet")
