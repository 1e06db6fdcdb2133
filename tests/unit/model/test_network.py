"""The network's shapes, branches, initial weights and freezing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from reid_train.model.network import ReidNet


def _images(count: int = 2, height: int = 64, width: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small() -> ReidNet:
    return ReidNet("resnet18", identities=7, seed=3)


@pytest.mark.parametrize(
    ("backbone", "channels"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)]
)
@pytest.mark.parametrize("stripes", [0, 2])
def test_heads_of_each_backbone(backbone, channels, stripes):
    network = ReidNet(backbone, identities=5, stripes=stripes)
    output = network(_images())
    sizes = [channels] + [channels // 2] * stripes
    assert [pooled.shape for pooled in output.pooled] == [(2, size) for size in sizes]
    assert [logits.shape for logits in output.logits] == [(2, 5)] * (1 + stripes)
    assert network.embedding_size == sum(sizes)


def test_resnet50_has_the_papers_embedding_and_map():
    network = ReidNet("resnet50", identities=4)
    maps = {}
    network.global_layer4.register_forward_hook(lambda m, i, out: maps.update(out=out.shape))
    with torch.no_grad():
        assert network.eval().embed(_images(1, 384, 128)).shape == (1, 4096)
    assert maps["out"] == (1, 2048, 24, 8)


def test_tensors_of_resnet50():
    # 161 of torchvision's ResNet-50 less fc's 2, conv5's 30 again, and of the heads: 3 batch norms
    # (6), 3 classifiers without bias, 2 reductions with bias (4).
    network = ReidNet("resnet50", identities=4)
    assert len(list(network.parameters())) == 161 - 2 + 30 + 6 + 3 + 4


def test_embedding_is_the_pooled_features_and_within_the_clip(small):
    small.eval()
    output = small(_images())
    embedding = small.embed(_images())
    torch.testing.assert_close(embedding, torch.cat(output.pooled, dim=1))
    assert 0.0 <= embedding.min() <= embedding.max() <= 1.0


def test_the_last_stripe_takes_the_remainder():
    network = ReidNet("resnet18", identities=4, stripes=3).eval()
    heights = []
    for reduction in network.reductions:
        reduction.register_forward_hook(lambda m, inputs, out: heights.append(inputs[0].shape[2]))
    output = network(_images(2, 16 * 8, 32))  # a map of 8 rows
    assert heights == [2, 2, 4]
    assert [pooled.shape[1] for pooled in output.pooled] == [512, 170, 170, 170]


def test_both_copies_of_the_last_stage_start_equal_and_separate(small):
    assert small.regional_layer4 is not None
    pairs = list(
        zip(small.global_layer4.parameters(), small.regional_layer4.parameters(), strict=True)
    )
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)


def test_classifiers_start_as_in_the_paper(small):
    for head in (small.global_head, *small.regional_heads):
        assert head.classifier.bias is None
        assert head.classifier.weight.std().item() == pytest.approx(0.001, rel=0.1)
        assert (head.norm.eps, head.norm.momentum) == (2e-5, 0.01)


def test_initial_weights_depend_only_on_the_seed():
    torch.manual_seed(11)
    first = ReidNet("resnet18", identities=4, seed=9)
    after = torch.rand(3)
    torch.manual_seed(12)
    again, other = (ReidNet("resnet18", identities=4, seed=seed) for seed in (9, 10))
    state = first.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert not torch.equal(other.trunk.conv1.weight, first.trunk.conv1.weight)  # type: ignore
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), after), "the global random state is left alone"


def test_a_frozen_backbone_keeps_weights_and_statistics():
    network = ReidNet("resnet18", identities=4).train()
    network.freeze_backbone(True)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    sum(logits.square().sum() + 1.0 for logits in network(_images(4)).logits).backward()
    optimizer.step()
    changed = {n for n, value in network.state_dict().items() if not torch.equal(value, before[n])}
    assert changed
    assert all(name.startswith(("global_head", "regional_heads", "reductions")) for name in changed)


def test_a_frozen_backbone_stays_in_evaluation_mode_through_train_and_eval():
    network = ReidNet("resnet18", identities=4)
    network.freeze_backbone(True)
    network.eval()
    network.train()
    modes = {module.training for part in network.backbone_modules() for module in part.modules()}
    assert modes == {False}
    assert network.global_head.norm.training
    network.freeze_backbone(False)
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_backbone_parameters_are_all_but_the_heads(small):
    heads = nn.ModuleList([small.global_head, small.regional_heads, small.reductions])
    ours = {id(p) for part in small.backbone_modules() for p in part.parameters()}
    assert ours.isdisjoint({id(p) for p in heads.parameters()})
    assert len(ours) + len(list(heads.parameters())) == len(list(small.parameters()))


def test_channels_last_gives_the_same_output(small):
    small.eval()
    expected = small.embed(_images())
    moved = ReidNet("resnet18", identities=7, seed=3).eval().to(memory_format=torch.channels_last)
    images = _images().to(memory_format=torch.channels_last)
    torch.testing.assert_close(moved.embed(images), expected, rtol=1e-4, atol=1e-5)


def test_pooled_features_are_float32_under_autocast(small):
    with torch.autocast("cpu", torch.bfloat16):
        output = small(_images())
    assert {pooled.dtype for pooled in output.pooled} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet51", "identities": 4}, "resnet50"),
        ({"backbone": "resnet18", "identities": 1}, "identities"),
        ({"backbone": "resnet18", "identities": 4, "stripes": -1}, "stripes"),
    ],
)
def test_impossible_networks_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ReidNet(**arguments)


def test_images_too_low_for_the_stripes_are_refused(small):
    with pytest.raises(ConfigError, match="1 rows for 2 stripes"):
        small(_images(2, 16, 32))


@pytest.mark.parametrize(
    ("stripes", "size", "parts"),
    [(2, 256, [128, 64, 64]), (3, 100, [52, 16, 16, 16]), (0, 100, [100])],
)
def test_an_embedding_size_is_shared_half_by_the_global_branch(stripes, size, parts):
    network = ReidNet("resnet18", identities=4, stripes=stripes, embedding_size=size).eval()
    images = _images(2, 128, 32)
    assert [pooled.shape[1] for pooled in network(images).pooled] == parts
    assert network.embedding_size == network.embed(images).shape[1] == size


def test_an_embedding_too_short_for_the_stripes_is_refused():
    with pytest.raises(ConfigError, match="2 stripes; 0 to 1"):
        ReidNet("resnet18", identities=4, embedding_size=3)


def test_gem_starts_as_the_cubic_mean_and_learns_its_exponent():
    network = ReidNet("resnet18", identities=4, pooling="gem", stripes=0)
    features = torch.rand(2, 512, 4, 3) * 3
    pooled = network.global_head.pool(features)
    torch.testing.assert_close(pooled, features.pow(3).mean((2, 3)).pow(1 / 3))
    assert pooled.max() > 1, "not clipped"
    pooled.sum().backward()
    assert network.global_head.exponent_offset.grad.abs() > 0


@pytest.mark.parametrize("offset", [-9.0, 0.0, 9.0])
def test_gem_of_a_dead_channel_has_a_finite_gradient(offset):
    head = ReidNet("resnet18", identities=4, pooling="gem", stripes=0).global_head
    nn.init.constant_(head.exponent_offset, offset)
    features = torch.zeros(2, 512, 4, 3, requires_grad=True)
    head.pool(features).sum().backward()
    assert features.grad.isfinite().all()
    assert head.exponent_offset.grad.isfinite().all()


def test_a_bnneck_embedding_is_that_after_the_heads_batch_norm():
    options = {"identities": 4, "seed": 1}
    plain, after = (ReidNet("resnet18", embedding=e, **options) for e in ("pooled", "bnneck"))
    for network in (plain, after):
        network(_images(4))  # gives the batch norm statistics
        network.eval()
    heads = (plain.global_head, *plain.regional_heads)
    sizes = [head.norm.num_features for head in heads]
    parts = plain.embed(_images()).split(sizes, dim=1)
    expected = torch.cat([h.norm(part) for h, part in zip(heads, parts, strict=True)], dim=1)
    torch.testing.assert_close(after.embed(_images()), expected)


@pytest.mark.parametrize(
    "changes",
    [{"model__pooling": "gem"}, {"model__embedding": "bnneck"}, {"model__embedding_size": 64}],
)
def test_settings_of_the_heads_come_from_the_configuration(changes):
    config = TrainConfig().replace(model__backbone="resnet18", **changes)
    (value,) = changes.values()
    network = ReidNet.from_config(config, 4)
    found = (network.global_head.exponent_offset is not None, network.after_norm)
    assert found == (value == "gem", value == "bnneck")
    assert network.embedding_size == (64 if value == 64 else 1024)
