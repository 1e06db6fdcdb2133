"""Pretrained weights: what loads, and what each wrong file is answered with."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torchvision import models

from data_shards.errors import ConfigError, DataError, StorageError
from reid_train.model import pretrained as weights
from reid_train.model.network import ReidNet
from reid_train.model.pretrained import load_backbone


@pytest.fixture(scope="module")
def pretrained() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return models.resnet18(weights=None).state_dict()


@pytest.fixture
def network() -> ReidNet:
    return ReidNet("resnet18", identities=4, seed=1)


def loaded(network: ReidNet, state: dict[str, Tensor]) -> bool:
    """Whether the network has some of the state's tensors, and both copies of the last stage."""
    places = {"trunk.conv1.weight": "conv1.weight"}
    places |= {"trunk.layer3.1.bn2.weight": "layer3.1.bn2.weight"}
    for copy in ("global_layer4", "regional_layer4"):
        places[f"{copy}.0.conv1.weight"] = "layer4.0.conv1.weight"
    own = network.state_dict()
    return all(torch.equal(own[here], state[there]) for here, there in places.items())


def test_weights_that_are_not_finite_are_refused(tmp_path, network, pretrained):
    broken = pretrained["layer1.0.conv1.weight"].clone()
    broken[0, 0, 0, 0] = torch.nan
    torch.save(pretrained | {"layer1.0.conv1.weight": broken}, tmp_path / "diverged.pth")
    with pytest.raises(DataError, match=r"not finite in layer1.0.conv1.weight: .* diverged"):
        load_backbone(network, str(tmp_path / "diverged.pth"))


@pytest.mark.parametrize("name", ["r18.safetensors", "r18.pth", "r18.pt"])
def test_a_state_dict_loads_into_both_copies_of_the_last_stage(tmp_path, network, pretrained, name):
    path = tmp_path / name
    if name.endswith("safetensors"):
        safetensors.torch.save_file(pretrained, path)
    else:
        torch.save(pretrained, path)
    load_backbone(network, str(path))
    assert loaded(network, pretrained)


def test_prefixes_wrappers_and_uncounted_batches_are_seen_through(tmp_path, network, pretrained):
    state = OrderedDict(
        (f"module.{name}", value)
        for name, value in pretrained.items()
        if "num_batches_tracked" not in name
    )
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "old.pth")
    load_backbone(network, str(tmp_path / "old.pth"))
    assert loaded(network, pretrained)


def test_a_file_beside_the_working_directory_loads(tmp_path, monkeypatch, network, pretrained):
    safetensors.torch.save_file(pretrained, tmp_path / "r18.safetensors")
    monkeypatch.chdir(tmp_path)
    load_backbone(network, "r18.safetensors")
    assert loaded(network, pretrained)


def test_none_leaves_the_initial_weights(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    load_backbone(network, "none")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_every_misfit_is_listed(tmp_path, network, pretrained):
    state = dict(pretrained)
    del state["layer1.0.conv1.weight"]
    state["layer9.weight"] = torch.zeros(2)
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    safetensors.torch.save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(DataError) as error:
        load_backbone(network, str(tmp_path / "odd.safetensors"))
    for part in ("1 missing: layer1.0.conv1.weight", "1 not of this backbone: layer9.weight"):
        assert part in str(error.value)
    assert "conv1.weight (64, 1, 7, 7) for (64, 3, 7, 7)" in str(error.value)


class Unpleasant:
    """Something that a state dict has no business to hold."""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("code.pth", {"weight": Unpleasant()}, "holds more than tensors.* refused"),
        ("list.pt", [torch.zeros(1)], "not a state dict.* but a list"),
        ("none.pt", {}, "an empty state dict"),
        ("integers.pth", {0: torch.zeros(1)}, "has the key 0, not a name"),
        ("other.pth", {"epoch": 3, "weights": {}}, "epoch is a int, not a tensor; it has epoch, w"),
        ("broken.safetensors", b"\x08\0\0\0\0\0\0\0{]", "a damaged safetensors file"),
        ("broken.pth", b"PK\x03\x04 data.pkl cut off", "damaged or cut off"),
        ("zip.pth", b"PK\x03\x04 cut off", "is a ZIP archive"),
        ("page.pth", b"\n<!DOCTYPE html><html>virus scan warning</html>", "is an HTML page"),
        (
            "pointer.pth",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "Git LFS.*git lfs pull",
        ),
        ("error.pth", b'{"message": "Not Found"}', "is JSON"),
        ("error.pt", b'<?xml version="1.0"?><Error/>', "is an XML document"),
        ("packed.pth", b"\x1f\x8b\x08\0\0", "is compressed by gzip"),
        ("packed.safetensors", b"\x1f\x8b\x08\0\0", "is compressed by gzip"),
        ("page.safetensors", b"<html></html>", "is an HTML page"),
        ("note.pth", b"404: Not Found", "is text"),
        ("nothing.pth", b"", "is empty"),
        ("noise.pth", bytes(range(130, 255)), "neither safetensors nor a file of torch.save"),
    ],
)
def test_files_that_are_no_state_dict_are_refused(tmp_path, network, name, content, message):
    path: Path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(DataError, match=message):
        load_backbone(network, str(path))


def test_the_content_decides_and_not_the_name(tmp_path, network, pretrained):
    safetensors.torch.save_file(pretrained, tmp_path / "safe.pth")
    torch.save(pretrained, tmp_path / "torch.safetensors")
    torch.save(pretrained, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("safe.pth", "torch.safetensors", "old.pth"):
        load_backbone(ReidNet("resnet18", identities=4), str(tmp_path / name))
    load_backbone(network, str(tmp_path / "torch.safetensors"))
    assert loaded(network, pretrained)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "backbone."])
def test_wrappers_around_a_state_dict_are_seen_through(tmp_path, network, pretrained, key, prefix):
    state = {prefix + name: value for name, value in pretrained.items()}
    torch.save({"epoch": 3, key: state}, tmp_path / "wrapped.pth")
    load_backbone(network, str(tmp_path / "wrapped.pth"))
    assert loaded(network, pretrained)


@pytest.mark.parametrize("name", ["imagenet", "none"])
def test_a_folder_of_that_name_does_not_hide_the_setting(tmp_path, monkeypatch, network, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    loaded = []
    monkeypatch.setattr(weights, "_imagenet", lambda backbone: loaded.append(backbone) or {})
    if name == "none":
        load_backbone(network, name)
    else:
        with pytest.raises(DataError, match="missing"):
            load_backbone(network, name)
    assert loaded == ["resnet18"] * (name == "imagenet")


def test_a_missing_file_is_a_storage_error(tmp_path, network):
    with pytest.raises(StorageError):
        load_backbone(network, str(tmp_path / "gone.pth"))


def test_an_unknown_name_says_what_there_is(network):
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        load_backbone(network, "imagnet")


def test_imagenet_without_a_network_says_how_to_give_a_path(monkeypatch, network):
    tries = []

    def refuse(url: str, **_: object) -> None:
        tries.append(url)
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(weights, "RETRY_WAIT", 0.0)
    with pytest.raises(ConfigError, match=r"give its path or s3:// URL"):
        load_backbone(network, "imagenet")
    assert len(tries) == weights.DOWNLOAD_TRIES


def test_imagenet_weights_load_by_name(monkeypatch, network, pretrained):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: pretrained)
    load_backbone(network, "imagenet")
    assert loaded(network, pretrained)
