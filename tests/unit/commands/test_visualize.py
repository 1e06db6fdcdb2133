"""`visualize`: the page and pictures of a model and a dataset."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tiny import build_dataset, narrow_resnet18
from tiny_checkpoint import original  # noqa: F401
from torchvision.models import resnet

from data_shards.errors import ConfigError, DataError
from reid_train.commands.visualize import Visualize, visualize
from reid_train.config import LoaderConfig
from reid_train.model.embedder import Embedder


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "resnet18", narrow_resnet18)


def run(folder: Path, model: Path, data: str) -> tuple[Path, str]:
    console = Console(file=io.StringIO(), width=200)
    loader = LoaderConfig(workers=0, cache=folder / "cache")
    settings = Visualize(str(model), data, to=str(folder / "seen"), loader=loader, device="cpu")
    return visualize(settings, console), console.file.getvalue()  # type: ignore[attr-defined]


def test_page_has_the_metrics_and_three_pictures(tmp_path, original):  # noqa: F811
    page, printed = run(tmp_path, original[0], build_dataset(tmp_path / "raw"))
    assert str(page) in printed
    text = page.read_text()
    assert "mAP" in text
    assert text.count("<figure>") == 3
    names = "rank_list", "activations", "embedding_map"
    for name in names:
        picture = np.asarray(Image.open(page.with_name(f"{name}.png")).convert("RGB"))
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100, name


def test_dataset_without_a_query_is_an_error_before_the_model_is_loaded(tmp_path):
    data = build_dataset(tmp_path / "raw", splits=("train",))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in ("model.safetensors", "config.json"):
        (damaged / file).touch()
    with pytest.raises(DataError, match="query is empty"):
        run(tmp_path, damaged, data)


def test_activation_is_strong_where_the_image_is_not_blank(original):  # noqa: F811
    embedder = Embedder.from_folder(original[0], "cpu")
    image = np.full((128, 128, 3), 124, np.uint8)
    image[:64] = np.random.default_rng(0).integers(0, 256, (64, 128, 3))
    (found,) = embedder.activations([image])
    assert found.shape[0] >= 2
    half = len(found) // 2
    assert found[:half].std() > 0
    assert not np.array_equal(found[:half], found[half:])


def test_onnx_file_has_no_maps_to_look_at(tmp_path):
    with pytest.raises(ConfigError, match="give the model that it was exported from"):
        run(tmp_path, tmp_path / "model.onnx", "nowhere")


def test_the_page_cannot_be_drawn_on_s3():
    settings = Visualize("model", "data", to="s3://bucket/page")
    with pytest.raises(ConfigError, match="--to draws on this machine's disk: give a path, not s3"):
        visualize(settings, Console(quiet=True))
