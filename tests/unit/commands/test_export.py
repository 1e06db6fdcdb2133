"""`export`: a file for other programs says what PyTorch says, or is not written."""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import build_dataset, narrow_resnet18
from tiny_checkpoint import original  # noqa: F401
from torchvision.models import resnet

from cluster.serve.embedder import Embedder as Replica
from cluster.serve.settings import Settings
from data_shards.errors import ConfigError, DataError
from reid_train.commands import export as commands
from reid_train.commands.export import Export, Parity, export
from reid_train.commands.runtime import open_runtime, weights_digest
from reid_train.commands.search import Compare, compare
from reid_train.config import ImageConfig, LoaderConfig, ModelConfig, TrainConfig
from reid_train.model import exported
from reid_train.model.embedder import Embedder
from reid_train.model.exported import open_exported, open_onnx
from reid_train.model.network import ReidNet
from reid_train.registry.load import load

DOCS = Path(__file__).parents[3] / "docs" / "SEARCH.md"


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "resnet18", narrow_resnet18)
        yield


@pytest.fixture(scope="module")
def model(original) -> str:  # noqa: F811
    return str(original[0])


@pytest.fixture(scope="module")
def embedder(model: str, narrow) -> Embedder:
    return load(model, device="cpu")


def run(model: str, out: Path, **options) -> tuple[Parity, str]:
    console = Console(file=io.StringIO(), width=200)
    parity = export(Export(model, str(out), **options), console)
    return parity, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def onnx(model: str, narrow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "reid.onnx"
    parity, said = run(model, out)
    assert parity.error < 1e-5
    assert parity.resized < 0.05
    assert "128 numbers an image" in said
    return out


@pytest.fixture
def exported_before(onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the file of the other tests instead of exporting anew, which takes seconds."""
    monkeypatch.setattr(exported, "export", lambda _, path, *more: shutil.copy(onnx, path))


def images(count: int, height: int, width: int) -> np.ndarray:
    """Smooth images: noise would make the difference of two ways to round larger."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 4, 2, 3)).repeat(height // 4, 1).repeat(width // 2, 2)
    return coarse.astype(np.uint8)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)).max())


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32), (5, 48, 24), (2, 80, 70)])
def test_the_onnx_file_takes_any_number_and_size_of_images(onnx, embedder, shape):
    given = images(*shape)
    expected, found = embedder(given), open_exported(onnx)(given)
    assert found.dtype == np.float32
    assert difference(expected, found) < (1e-5 if shape[1:] == (32, 32) else 0.03)


def test_averaging_over_areas_is_that_of_opencv(onnx, embedder):
    given = np.random.default_rng(0).integers(0, 256, (2, 100, 90, 3), np.uint8)
    assert difference(embedder(given), open_exported(onnx)(given)) < 2e-3


def test_the_file_has_its_facts(onnx, model, embedder):
    _, facts = open_onnx(onnx, "cpu")
    assert facts["weights"] == weights_digest(Path(model))
    assert (facts["height"], facts["width"], facts["dimensions"]) == ("32", "32", "128")


def test_half_precision_is_half_as_large_and_close(tmp_path, model, onnx, embedder):
    parity, _ = run(model, tmp_path / "half.onnx", precision="fp16")
    assert 1e-5 < parity.error < 2e-2
    assert (tmp_path / "half.onnx").stat().st_size < 0.7 * onnx.stat().st_size
    assert open_exported(tmp_path / "half.onnx")(images(2, 32, 32)).dtype == np.float32


def test_an_exported_program_of_pytorch_gives_the_same(tmp_path, model, embedder):
    parity, _ = run(model, tmp_path / "reid.pt2", format="torch-export")
    assert parity.error < 1e-5
    given = images(3, 32, 32)
    assert difference(embedder(given), open_exported(tmp_path / "reid.pt2")(given)) < 1e-5


BACKBONES = ["test_convnext", "test_vit", "test_resnet", "test_efficientnet"]
BACKBONES += ["mobilenetv3_small_050", "swin_tiny_patch4_window7_224"]
EXPORTS = [(f"timm:{name}", suffix) for suffix in (".pt2", ".onnx") for name in BACKBONES]
EXPORTS += [("resnet50", ".pt2"), ("resnet50", ".onnx")]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [*EXPORTS[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in EXPORTS[2:])],
)
def test_a_backbone_of_each_family_is_exported(tmp_path, name, suffix):
    size, backbone = ImageConfig(height=64, width=32), ModelConfig(backbone=name, weights="none")
    config = TrainConfig(recipe="test", image=size, model=backbone)
    torch.manual_seed(0)
    made = Embedder(ReidNet.from_config(config, identities=2), config, "cpu")
    facts = dict.fromkeys(("height", "width", "batch", "dimensions", "weights"), "1")
    exported.export(made, tmp_path / f"reid{suffix}", "fp32", facts)
    run = open_exported(tmp_path / f"reid{suffix}")
    for count in (1, 3):
        given = images(count, 64, 32)
        assert difference(made(given), run(given)) < 1e-5


def test_the_code_of_the_page_runs_without_pytorch_and_this_project(tmp_path, onnx, embedder):
    block = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert block is not None
    assert len(block[1].strip().splitlines()) <= 12
    assert not re.search(r"import (?!numpy|onnxruntime)", block[1])
    (tmp_path / "reid.onnx").write_bytes(onnx.read_bytes())
    crops = [images(1, 32, 32)[0], images(1, 80, 40)[0]]
    np.savez(tmp_path / "crops.npz", *crops)
    code = (
        "import sys\n"
        "for name in ('torch', 'cv2', 'reid_train', 'data_shards'): sys.modules[name] = None\n"
        f"{block[1]}\n"
        "np.save('found.npy', embed(list(np.load('crops.npz').values())))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    expected = np.concatenate([embedder(crop[None]) for crop in crops])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert difference(expected, np.load(tmp_path / "found.npy")) < 0.03


def test_search_and_compare_run_the_file(tmp_path, model, onnx):
    names = []
    for number in range(2):
        names.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(images(2, 32, 32)[number]).save(names[-1])
    console = Console(file=io.StringIO())
    similar = compare(Compare(*names, model), console)
    assert compare(Compare(*names, str(onnx)), console) == pytest.approx(similar, abs=1e-4)
    runtime = open_runtime(str(onnx), "cpu", None, "onnx")
    assert (runtime.height, runtime.width, runtime.batch) == (32, 32, 5)


def test_a_replica_of_the_service_embeds_with_the_file_as_with_pytorch(model, onnx, embedder):
    given, threads = images(3, 32, 32), torch.get_num_threads()

    async def embedded(name: str) -> tuple[np.ndarray, str]:
        replica = Replica(Settings(name, "gallery", device="cpu"))
        return await replica.embed_pixels(name, given), (await replica.describe(name))["runtime"]

    try:
        found = {name: asyncio.run(embedded(name)) for name in (model, str(onnx))}
    finally:
        torch.set_num_threads(threads)
    assert [runtime for _, runtime in found.values()] == ["torch", "onnx"]
    for embedding, _ in found.values():
        assert difference(embedder(given), embedding) < 1e-5


@pytest.mark.parametrize(
    ("file", "engine", "kind", "message"),
    [
        ("reid.onnx", "torch", ConfigError, "is an ONNX file: leave out --runtime torch"),
        ("run", "onnx", ConfigError, "--runtime onnx needs an ONNX file"),
        ("torn.onnx", None, DataError, "torn.onnx is not a whole ONNX file"),
    ],
)
def test_another_file_than_an_export_is_refused(tmp_path, file, engine, kind, message):
    (tmp_path / file).write_bytes(b"torn")
    with pytest.raises(kind, match=message):
        open_runtime(str(tmp_path / file), "cpu", None, engine)


@pytest.mark.usefixtures("exported_before")
def test_nothing_is_written_if_the_file_differs_from_pytorch(tmp_path, model, monkeypatch):
    def noisy(path: Path):
        real = open_exported(path)
        return lambda pixels: real(pixels) * 1.01

    monkeypatch.setattr(exported, "open_exported", noisy)
    with pytest.raises(DataError, match=r"differ from PyTorch's by 1.0e-02 .* nothing was written"):
        run(model, tmp_path / "reid.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("exported_before")
def test_the_map_of_the_file_is_measured_and_must_be_that_of_pytorch(tmp_path, model, monkeypatch):
    data = build_dataset(tmp_path / "raw")
    options = {"data": data, "loader": LoaderConfig(workers=0, cache=tmp_path / "cache")}
    parity, said = run(model, tmp_path / "reid.onnx", **options)
    assert parity.mean_average_precision == pytest.approx(parity.of_torch, abs=5e-4)
    assert f"mAP {100 * parity.of_torch:.2f} % from the file" in said
    scores = iter([0.5, 0.501])
    monkeypatch.setattr(commands, "_mean_average_precision", lambda *_: next(scores))
    with pytest.raises(DataError, match=r"mAP 50.000 % .* PyTorch 50.100 %: more than 0.05 points"):
        run(model, tmp_path / "other.onnx", **options)
    assert not (tmp_path / "other.onnx").exists()


def test_data_without_a_gallery_is_refused_before_the_work(tmp_path, model):
    data = build_dataset(tmp_path / "raw", ("train",))
    with pytest.raises(DataError, match="the query is empty"):
        run(model, tmp_path / "reid.onnx", data=data)


def test_the_missing_package_is_named(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"onnxscript: pip install -e '.\[export\]'"):
        run(model, tmp_path / "reid.onnx")


def test_the_name_of_the_file_tells_its_format(tmp_path, model):
    with pytest.raises(ConfigError, match=r"--format torch-export is named \*.pt2"):
        run(model, tmp_path / "reid.onnx", format="torch-export")
