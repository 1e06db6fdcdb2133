"""`search` and `compare`: which images are found, and what a person is told of bad input."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image
from rich.console import Console
from tiny import build_dataset, narrow_resnet18
from tiny_checkpoint import original  # noqa: F401
from torchvision.models import resnet

from data_shards.building.build import build
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, ObjectMissing, ReidError
from data_shards.images import ImageFolder
from data_shards.loading.decode import decode
from data_shards.storage import open_storage
from reid_train.commands.runtime import open_runtime
from reid_train.commands.search import Compare, Match, Search, compare, search
from reid_train.config import LoaderConfig
from reid_train.evaluation.embedding_store import EmbeddingTable, part_key, write_part
from reid_train.evaluation.thresholds import Threshold, Thresholds
from reid_train.report import style


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "resnet18", narrow_resnet18)


@pytest.fixture(scope="module")
def model(original) -> str:  # noqa: F811
    return str(original[0])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A sharded dataset, and a folder of its gallery's images."""
    made = tmp_path_factory.mktemp("data")
    dataset = Dataset.open(build_dataset(made / "raw"))
    index = dataset.index("gallery")
    for row, path in enumerate(index.path):
        file = made / "people" / "of a street" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(dataset.read(index, row))
    return dataset.url, made / "people"


def run(tmp_path: Path, photos: tuple, model: str, gallery: object, **options) -> tuple[list, str]:
    """The matches of each photo, and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    options = {"picture": str(tmp_path / "ranks.png")} | options
    loader = LoaderConfig(workers=0, cache=tmp_path / "cache")
    settings = Search(tuple(map(str, photos)), model, str(gallery), loader=loader, **options)
    found = search(settings, console)
    return found, console.file.getvalue()  # type: ignore[attr-defined]


def naive(model: str, photo: Path, folder: Path) -> list[tuple[str, float]]:
    """Paths and similarities, by embedding one image at a time."""
    runtime = open_runtime(model, "cpu", None)

    def unit(path: Path) -> np.ndarray:
        vector = runtime.photos([decode(path.read_bytes())])[0].astype(np.float64)
        return vector / np.linalg.norm(vector)

    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    scored = [(name, float(unit(photo) @ unit(folder / name))) for name in names]
    return sorted(scored, key=lambda found: -found[1])


def save(path: Path, height: int = 24, width: int = 16, seed: int = 1) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_folder_is_ranked_by_cosine_similarity(tmp_path, model, data):
    photo = save(tmp_path / "photo.png")
    (ranked,), text = run(tmp_path, (photo,), model, data[1], top=5)
    expected = naive(model, photo, data[1])[:5]
    assert [match.path for match in ranked] == [name for name, _ in expected]
    np.testing.assert_allclose([m.similarity for m in ranked], [s for _, s in expected], atol=1e-5)
    assert all(match.camera is None for match in ranked)
    assert expected[0][0] in text
    assert f"{expected[0][1]:.3f}" in text
    assert Image.open(tmp_path / "ranks.png").width > 800


def test_an_image_of_the_gallery_finds_itself_first(tmp_path, model, data):
    first, second = sorted(data[1].rglob("*.png"))[:2]
    found, _ = run(tmp_path, (second, first), model, data[1])
    for photo, ranked in zip((second, first), found, strict=True):
        assert data[1] / ranked[0].path == photo
        assert ranked[0].similarity == pytest.approx(1, abs=1e-6)


def test_shards_and_embeddings_give_the_ranks_of_the_folder_with_cameras(tmp_path, model, data):
    photo, (url, folder) = save(tmp_path / "photo.png"), data
    (plain,), _ = run(tmp_path, (photo,), model, folder, top=30)
    (sharded,), text = run(tmp_path, (photo,), model, url, top=30)
    assert [Path(match.path).name for match in plain] == [match.path for match in sharded]
    assert {match.camera for match in sharded} == {0, 1, 2}
    assert "camera" in text

    kept = embeddings_of(model, folder, tmp_path / "kept")
    (read,), text = run(tmp_path, (photo,), model, kept, top=30)
    assert [match.path for match in read] == [match.path for match in plain]
    np.testing.assert_allclose(
        [match.similarity for match in read], [match.similarity for match in plain], atol=1e-5
    )
    assert "give --images" in text
    (tmp_path / "ranks.png").unlink()
    run(tmp_path, (photo,), model, kept, images=str(folder))
    assert (tmp_path / "ranks.png").exists()


def embeddings_of(model: str, folder: Path, out: Path, width: int | None = None) -> Path:
    images, runtime = ImageFolder.open(str(folder)), open_runtime(model, "cpu", None)
    embedding = runtime.photos([decode(images.read(row)) for row in range(len(images.path))])
    unknown = np.full(len(embedding), -1)
    split = np.full(len(embedding), "gallery")
    table = EmbeddingTable(embedding[:, :width], unknown, unknown, split, images.path)
    write_part(open_storage(str(out)), part_key(0), table)
    return out


def test_embeddings_of_another_model_are_refused(tmp_path, model, data):
    photo = save(tmp_path / "photo.png")
    narrow = embeddings_of(model, data[1], tmp_path / "narrow", width=50)
    with pytest.raises(DataError, match="50 dimensions, and this model gives 128"):
        run(tmp_path, (photo,), model, narrow)
    other = embeddings_of(model, data[1], tmp_path / "other")
    (other / "job.json").write_text(json.dumps({"weights": "0" * 64, "parts": 1}))
    with pytest.raises(DataError, match="embeddings of another model: embed the gallery again"):
        run(tmp_path, (photo,), model, other)


def test_unreadable_images_are_left_out_and_named(tmp_path, model, data, caplog):
    folder = tmp_path / "people"
    shutil.copytree(data[1], folder)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    (folder / "._1.jpg").write_bytes(b"resource fork")
    (folder / "notes.txt").write_text("not an image")
    photo = save(tmp_path / "photo.png")
    with caplog.at_level(logging.WARNING):
        (ranked,), _ = run(tmp_path, (photo,), model, folder, top=30)
    assert [m.path for m in ranked] == [name for name, _ in naive(model, photo, data[1])]
    assert "1 unreadable image left out: broken.jpg (corrupt JPEG" in caplog.text
    assert "1 file of macOS left out: ._1.jpg" in caplog.text
    for image in folder.rglob("*.png"):
        image.unlink()
    with pytest.raises(DataError, match=r"none of the 1 images at .* can be read"):
        run(tmp_path, (photo,), model, folder)


@pytest.mark.parametrize(
    ("height", "width", "warned"), [(24, 16, False), (16, 24, True), (90, 10, True)]
)
def test_a_photo_of_another_shape_than_a_person_is_warned_of(
    tmp_path, model, data, height, width, warned
):
    photo = save(tmp_path / "photo.png", height, width)
    _, text = run(tmp_path, (photo,), model, data[1], top=1)
    assert (f"photo.png is {width} × {height} pixels, {height / width:.2g} times" in text) == warned


def test_what_is_no_photo_is_refused_in_one_line(tmp_path, model, data):
    (tmp_path / "notes.jpg").write_text("hello")
    (tmp_path / "empty").mkdir()
    good = save(tmp_path / "photo.png")
    cases: list[tuple[object, object, type[ReidError], str]] = [
        (tmp_path / "absent.jpg", data[1], ObjectMissing, "there is no image"),
        (tmp_path / "notes.jpg", data[1], DataError, "notes.jpg: not a readable image"),
        (tmp_path / "empty", data[1], DataError, "is a folder: give one image file"),
        (good, tmp_path / "empty", DataError, "neither shards nor images"),
        (good, tmp_path / "absent", DataError, "there is no such folder"),
        (good, tmp_path / "kept.npz", ConfigError, "a Parquet file or a folder of parts"),
    ]
    for photo, gallery, kind, message in cases:
        with pytest.raises(kind, match=message) as raised:
            run(tmp_path, (photo,), model, gallery)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "--top must lie between 1 and 200"),
        ({"picture": "ranks.jpg"}, "the name of a PNG file"),
        ({"picture": "s3://b/ranks.png"}, "--picture draws on this machine's disk: give a path"),
        ({"images": "photos"}, "--images goes with a gallery of embeddings"),
        ({"photos": ()}, "give the photos to search for"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, model, data, options, message):
    photos = options.pop("photos", (save(tmp_path / "photo.png"),))
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, photos, model, data[1], **options)


def test_a_split_without_images_is_named(tmp_path, model, data):
    photo = save(tmp_path / "photo.png")
    with pytest.raises(DataError, match="no images in its split val: choose another with --split"):
        run(tmp_path, (photo,), model, data[0], split="val")


def test_ranks_are_written_as_json_and_the_picture_can_be_off(tmp_path, model, data):
    photo, out = save(tmp_path / "photo.png"), tmp_path / "found.json"
    (ranked,), _ = run(tmp_path, (photo,), model, data[1], picture="off", output=str(out))
    written = json.loads(out.read_text())["photos"]
    assert [Match(**match) for match in written[0]["matches"]] == ranked
    assert not (tmp_path / "ranks.png").exists()


def test_compare_gives_the_cosine_similarity(tmp_path, model, data):
    photo, other = save(tmp_path / "photo.png"), sorted(data[1].rglob("*.png"))[0]
    console = Console(file=io.StringIO())
    assert compare(Compare(str(photo), str(photo), model), console) == pytest.approx(1)
    found = compare(Compare(str(photo), str(other), model), console)
    name = other.relative_to(data[1]).as_posix()
    assert found == pytest.approx(dict(naive(model, photo, data[1]))[name], abs=1e-5)
    assert f"similarity {found:.4f}" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def deciding(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with thresholds at two rates, and at one of them for cameras 5 and 0."""
    folder = tmp_path_factory.mktemp("deciding") / "checkpoint"
    shutil.copytree(model, folder)

    def at(rate: float, similarity: float) -> Threshold:
        return Threshold(rate, similarity, similarity - 0.1, similarity + 0.1, 0.9, 0.8, 1.0)

    pair = Thresholds(3000, 9, 5, (at(1e-2, -2.0),), (1e-3,))
    cameras = {"5-0": pair}
    known = Thresholds(50_000, 99, 5, (at(1e-2, 0.5), at(1e-3, 2.0)), (1e-4,), cameras=cameras)
    np.savez(folder / "rank_list.npz", thresholds=np.array(json.dumps(known.to_json())))
    return str(folder)


def test_a_match_is_the_same_person_above_the_threshold(tmp_path, deciding, data):
    photo = save(tmp_path / "photo.png")
    (ranked,), text = run(tmp_path, (photo,), deciding, data[1])
    assert {match.same for match in ranked} == {False}  # at 0.001, the default
    assert "the threshold is 2.0000 (1.9000 to 2.1000) at a false accept rate of 0.001" in text
    (ranked,), text = run(tmp_path, (photo,), deciding, data[1], false_accept_rate=1e-2, top=30)
    assert [match.same for match in ranked] == [match.similarity > 0.5 for match in ranked]
    assert "same person" in text


def test_cameras_decide_by_their_own_threshold(tmp_path, deciding, data):
    photo, options = save(tmp_path / "photo.png"), {"false_accept_rate": 1e-2, "top": 30}
    (ranked,), _ = run(tmp_path, (photo,), deciding, data[0], camera="5", **options)
    assert {match.same for match in ranked if match.camera == 0} == {True}
    others = [match for match in ranked if match.camera != 0]
    assert [match.same for match in others] == [match.similarity > 0.5 for match in others]


def test_compare_decides(tmp_path, deciding):
    photo, console = str(save(tmp_path / "photo.png")), Console(file=io.StringIO(), width=200)
    compare(Compare(photo, photo, deciding, false_accept_rate=1e-2), console)
    compare(Compare(photo, photo, deciding), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "the same person: the threshold is 0.5000" in said
    assert "another person: the threshold is 2.0000" in said


def test_a_rate_that_was_not_measured_is_refused(tmp_path, deciding, model, data):
    photo = save(tmp_path / "photo.png")
    with pytest.raises(DataError, match=r"0.0001, but at: 0.01, 0.001. That rate needs 300,000"):
        run(tmp_path, (photo,), deciding, data[1], false_accept_rate=1e-4)
    with pytest.raises(ConfigError, match="has no thresholds"):
        run(tmp_path, (photo,), model, data[1], false_accept_rate=1e-3)


def test_search_shows_the_names_of_people_and_cameras(tmp_path, model, monkeypatch):
    lines = ["path,pid,camid,split"]
    for person in ("anna", "ben"):
        for camera in ("door", "hall"):
            save(tmp_path / f"{person}-{camera}.png", seed=len(lines))
            lines.append(f"{person}-{camera}.png,{person},{camera},gallery")
    (tmp_path / "people.csv").write_text("\n".join(lines))
    url = str(tmp_path / "shards")
    build("csv", tmp_path / "people.csv", url, jobs=1)
    drawn = texts(monkeypatch)
    (ranked,), text = run(tmp_path, (tmp_path / "ben-door.png",), model, url)
    assert {"anna", "ben", "door", "hall", "ben-door.png"} <= set(drawn[0])
    assert (ranked[0].person, ranked[0].camera_name) == ("ben", "door")
    assert re.search(r"1 +ben-door.png +ben +door +1\.0000", text)
    (same,), _ = run(tmp_path, (tmp_path / "ben-door.png",), model, url, camera="door")
    assert same == ranked
    with pytest.raises(
        DataError, match=r"no camera is named 'dor': give a number, or one of door, hall"
    ):
        run(tmp_path, (tmp_path / "ben-door.png",), model, url, camera="dor")


def texts(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Fill a list with the texts of each picture that is drawn from now on."""
    found: list[list[str]] = []

    def save(figure, path):
        found.append([text.get_text() for text in figure.findobj(Text) if text.get_text()])

    monkeypatch.setattr(style, "save", save)
    return found


def test_the_picture_labels_photos_and_files_by_what_tells_them_apart(tmp_path, model, monkeypatch):
    for person in ("ida", "leo"):
        folder = tmp_path / "photos" / person
        folder.mkdir(parents=True)
        for number in (1, 2):
            save(folder / f"door_{number}.png", seed=10 * number + len(person) + ord(person[0]))
    photos = [tmp_path / "photos" / person / "door_1.png" for person in ("ida", "leo")]
    drawn = texts(monkeypatch)
    run(tmp_path, photos, model, tmp_path / "photos")
    run(tmp_path, photos[:1], model, tmp_path / "photos" / "ida")
    both, one = drawn
    assert {"ida", "leo"} <= set(both)  # beside door_1.png
    assert both.count("door_1.png") == 2
    assert both.count("ida/door_2.png") == both.count("leo/door_2.png") == 2
    assert "2 queries, each with the gallery images that are most similar to it" in both
    assert "1 query, with the gallery images that are most similar to it" in one
    assert one.count("door_2.png") == 1


def test_searches_for_photos_of_one_name_have_pictures_of_their_own(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for person in ("ida", "leo"):
        Path(person).mkdir()
        save(Path(person, "door_1.png"))
    for person in ("ida", "leo", "ida"):  # the last draws the first again
        _, text = run(tmp_path, (f"{person}/door_1.png",), model, "ida", picture=None)
        (path,) = re.findall(r"rank list +(reports/search-door_1-\w+\.png)", text)
        assert Path(path).exists()
    assert len(list(Path("reports").iterdir())) == 2


def test_compare_says_why_it_makes_no_decision(tmp_path, model):
    photo, console = str(save(tmp_path / "photo.png")), Console(file=io.StringIO(), width=300)
    compare(Compare(photo, photo, model), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"no decision on same person or not: {model} has no thresholds" in said
    assert "evaluate --model models:/… --data … --thresholds" in said


def test_a_search_imports_neither_ray_nor_mlflow():
    code = (
        "import sys; from reid_train.commands import gallery, runtime, search; "
        "sys.exit(', '.join({'ray', 'mlflow', 'boto3'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
