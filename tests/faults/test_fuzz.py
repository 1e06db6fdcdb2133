"""Readers given damaged or hostile bytes: an error of our own, or a value that was checked."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_shards.errors import ReidError
from data_shards.index import Index
from data_shards.loading.decode import decode
from data_shards.manifest import FileInfo, Manifest, ShardInfo, SplitInfo, sha256
from data_shards.storage import LocalStorage
from reid_train.config import TrainConfig
from reid_train.evaluation.embedding_store import EmbeddingTable, read_embeddings, write_part
from reid_train.model.pretrained import read_state
from reid_train.recipes import recipe
from reid_train.registry.load import load
from reid_train.runs.run_dir import Run
from reid_train.training import checkpoint
from reid_train.training.checkpoint import FILES, SEAL, Checkpoint, Origin, Position
from reid_train.training.history import History
from tune.store import Store, Trial

FUZZ = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,  # the same bytes for everybody, so that a failure is everybody's
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
ROWS = 12
DEEP = b"[" * 100_000

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", -1, 1 << 70, 1e308, "\x00"])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with some flipped, cut off, repeated, or replaced altogether."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "other"]))
    if kind == "other":
        return draw(st.binary(max_size=300))
    at = draw(st.integers(0, len(whole) - 1))
    if kind == "cut":
        return whole[:at]
    if kind == "insert":
        return whole[:at] + draw(st.binary(min_size=1, max_size=20)) + whole[at:]
    changed = bytearray(whole)
    for position in [at, *draw(st.lists(st.integers(0, len(whole) - 1), max_size=5))]:
        changed[position] = draw(st.integers(0, 255))
    return bytes(changed)


@st.composite
def edited(draw: st.DrawFn, whole: Any) -> Any:
    """A JSON value with something in it replaced, removed or added."""
    if isinstance(whole, dict) and whole and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(whole)))
        match draw(st.sampled_from(["inside", "remove", "add"])):
            case "inside":
                return whole | {key: draw(edited(whole[key]))}
            case "remove":
                return {k: v for k, v in whole.items() if k != key}
            case _:
                return whole | {draw(st.text(max_size=5)): draw(values)}
    if isinstance(whole, list) and whole and draw(st.booleans()):
        at = draw(st.integers(0, len(whole) - 1))
        return [*whole[:at], draw(edited(whole[at])), *whole[at + 1 :]]
    return draw(values)


def survives(read: Callable[[], Any]) -> Any:
    """Read; an error of our own is an answer, another is a defect."""
    try:
        return read()
    except ReidError:
        return None


def people() -> tuple[Manifest, Index]:
    row = np.arange(ROWS)
    index = Index(
        shard=np.zeros(ROWS, np.int32),
        offset=512 + 2048 * row.astype(np.int64),
        size=np.full(ROWS, 700),
        pid=row // 3,
        label=row // 3,
        camid=(row % 3).astype(np.int32),
        width=np.full(ROWS, 16, np.int32),
        height=np.full(ROWS, 32, np.int32),
        path=np.array([f"a/{i}.jpg" for i in row], object),
    )
    data = index.to_parquet()
    shard = ShardInfo(
        name="shards/train-000000.tar", split="train", images=ROWS, bytes=1 << 16, sha256="a" * 64
    )
    manifest = Manifest(
        name="people",
        source="csv",
        options={},
        complete=True,
        content="c" * 64,
        splits={"train": SplitInfo(images=ROWS, identities=4, cameras=3)},
        shards=(shard,),
        index=FileInfo(name="index.parquet", bytes=len(data), sha256=sha256(data)),
    )
    return manifest, index


MANIFEST, INDEX = people()
PARQUET = INDEX.to_parquet()


def trustworthy(manifest: Manifest) -> bool:
    """Whether sizes are sizes, and no shard's name leaves the dataset."""
    inside = (".." not in info.name and not info.name.startswith("/") for info in manifest.shards)
    return all(inside) and all(s.bytes >= 0 and s.images >= 0 for s in manifest.shards)


@FUZZ
@given(edited(json.loads(MANIFEST.to_json())))
def test_manifest_of_any_json(value):
    manifest = survives(lambda: Manifest.from_json(json.dumps(value).encode()))
    assert manifest is None or trustworthy(manifest)


@FUZZ
@example(DEEP)
@given(damaged(MANIFEST.to_json()))
def test_manifest_of_any_bytes(data):
    manifest = survives(lambda: Manifest.from_json(data))
    assert manifest is None or trustworthy(manifest)


def held(index: Index) -> bool:
    """Whether every image lies within its shard, as whoever has an index may trust."""
    end = index.offset + index.size
    return bool((index.offset >= 0).all() and (index.size > 0).all() and (end <= 1 << 16).all())


@FUZZ
@given(damaged(PARQUET))
def test_index_of_any_bytes(data):
    index = survives(lambda: Index.from_parquet(data, MANIFEST))
    assert index is None or held(index)


columns = st.sampled_from(["shard", "offset", "size", "pid", "label", "camid", "width", "path"])
cells = st.none() | st.integers(-(1 << 63), (1 << 63) - 1) | st.binary(max_size=5)


@FUZZ
@given(columns, st.lists(cells, min_size=ROWS, max_size=ROWS))
def test_index_with_any_column(name, cells):
    kinds = {type(cell) for cell in cells} - {type(None)}
    column = cells if len(kinds) < 2 else [repr(cell) for cell in cells]
    table = pq.read_table(io.BytesIO(PARQUET))
    position = table.schema.get_field_index(name)
    sink = io.BytesIO()
    pq.write_table(table.set_column(position, name, pa.array(column)), sink)
    index = survives(lambda: Index.from_parquet(sink.getvalue(), MANIFEST))
    assert index is None or held(index)


PICTURE = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)
IMAGES = {name: cv2.imencode(f".{name}", PICTURE)[1].tobytes() for name in ("jpg", "png", "webp")}


@FUZZ
@given(st.sampled_from(sorted(IMAGES)).flatmap(lambda name: damaged(IMAGES[name])))
def test_image_of_any_bytes(data):
    pixels = survives(lambda: decode(data))
    assert pixels is None or pixels.dtype == np.uint8


def sealed(folder: Path, contents: dict[str, bytes]) -> None:
    for name in FILES:
        (folder / name).write_bytes(contents[name])
    seal = {name: sha256(contents[name]) for name in FILES}
    (folder / SEAL).write_text(json.dumps(seal))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A whole checkpoint's files, of one linear layer."""
    import torch

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    folder = tmp_path_factory.mktemp("saved")
    checkpoint.save(
        folder,
        config=recipe("demo"),
        origin=Origin("m" * 64, "e" * 64, 2),
        progress=Position(1, 0, 3, "all"),
        history=History(steps={"step": [1.0], "loss/total": [2.0]}),
        model=model,
        regularizer=None,
        optimizer=optimizer,
        rank_list={"query": np.arange(3)},
    )
    return {name: (folder / name).read_bytes() for name in FILES}


@FUZZ
@given(st.data())
def test_checkpoint_whose_files_are_sealed_but_wrong(saved, data):
    import torch

    name = data.draw(st.sampled_from(sorted(FILES)))
    if name.endswith(".json"):
        wrong = json.dumps(data.draw(edited(json.loads(saved[name])))).encode()
    else:
        wrong = data.draw(damaged(saved[name]))
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())

    def read() -> Checkpoint:
        opened = Checkpoint.open(Path(folder))
        opened.history()
        opened.load_model(model)
        opened.load_optimizer(optimizer)
        return opened

    with tempfile.TemporaryDirectory() as folder:
        sealed(Path(folder), saved | {name: wrong})
        opened = survives(read)
        assert opened is None or isinstance(opened.config, TrainConfig)
        embedder = survives(lambda: load(folder))
    assert embedder is None or isinstance(embedder.config, TrainConfig)


@FUZZ
@given(st.sampled_from(["x.safetensors", "x.pt"]), st.data())
def test_weights_of_any_bytes(saved, name, data):
    whole = saved["model.safetensors"]
    if name == "x.pt":
        import torch

        sink = io.BytesIO()
        torch.save({"weight": torch.ones(2, 2)}, sink)
        whole = sink.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(data.draw(damaged(whole)))
        state = survives(lambda: read_state(f"{folder}/{name}"))
    assert state is None or all(hasattr(value, "dtype") for value in state.values())


def embeddings() -> dict[str, bytes]:
    rng, sink = np.random.default_rng(0), io.BytesIO()
    arrays = {}
    for side in ("query", "gallery"):
        arrays[f"{side}_embedding"] = rng.random((6, 4), np.float32)
        arrays[f"{side}_pid"] = arrays[f"{side}_camid"] = np.arange(6)
    np.savez_compressed(sink, **arrays)
    split = np.array(["query"] * 6 + ["gallery"] * 6)
    with tempfile.TemporaryDirectory() as folder:
        table = EmbeddingTable(rng.random((12, 4), np.float32), np.arange(12), np.arange(12), split)
        write_part(LocalStorage(Path(folder)), "x.parquet", table)
        parquet = Path(folder, "x.parquet").read_bytes()
    return {"x.npz": sink.getvalue(), "x.parquet": parquet}


EMBEDDINGS = embeddings()


@FUZZ
@given(st.sampled_from(sorted(EMBEDDINGS)), st.data())
def test_embeddings_of_any_bytes(name, data):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(data.draw(damaged(EMBEDDINGS[name])))
        found = survives(lambda: read_embeddings(f"{folder}/{name}"))
    if found is not None:
        query, gallery, labels = found
        assert (len(query), len(gallery)) == (len(labels.query_pid), len(labels.gallery_pid))


RUN = json.loads(Run(recipe("demo").replace(name="r"), "m" * 64, None).to_json())


@FUZZ
@given(
    edited(RUN).map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(RUN).encode())
)
def test_run_of_any_bytes(data):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "r").mkdir()
        Path(folder, "r", "run.json").write_bytes(data)
        run = survives(lambda: Run.read(folder, "r"))
    assert run is None or isinstance(run.config, TrainConfig)


TRIAL = asdict(Trial(0, {"optimizer.learning_rate": 0.1}, evaluations=[{"epoch": 1, "mAP": 0.5}]))


@FUZZ
@given(
    edited(TRIAL).map(lambda value: json.dumps(value).encode())
    | damaged(json.dumps(TRIAL).encode())
)
@example(json.dumps(TRIAL | {"number": None}).encode())
def test_trial_of_any_bytes(data):
    with tempfile.TemporaryDirectory() as folder:
        store = Store(LocalStorage(Path(folder)))
        store.save(Trial(1, {}))
        Path(folder, "trials", "trial-000.json").write_bytes(data)
        trials = survives(store.trials)
    assert trials is None or 1 in {trial.number for trial in trials}
