"""Bad arrays are refused before anything is computed, in the same way on every branch."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from data_shards.errors import ConfigError, DataError
from reid_train.commands.evaluate import Evaluate
from reid_train.commands.evaluate import evaluate as evaluate_command
from reid_train.evaluation.evaluate import evaluate
from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.measures import Measures
from reid_train.evaluation.ranking import rank, top_matches
from reid_train.evaluation.reranking import rerank

QUERIES, GALLERY, DIMENSIONS = 6, 20, 8
BRANCHES = {
    "plain": Measures(),
    "euclidean": Measures(metric="euclidean"),
    "rerank": Measures(rerank=True, k1=5, k2=2),
    "expand": Measures(expand=2),
    "all": Measures(expand=2, augment=2, rerank=True, k1=5, k2=2),
    "more": Measures(camera_pairs=True, false_accept_rates=(0.1,)),
}


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    q, g = np.arange(QUERIES) % 4, np.arange(GALLERY) % 4
    return {
        "query": draw.standard_normal((QUERIES, DIMENSIONS)).astype(np.float32),
        "gallery": draw.standard_normal((GALLERY, DIMENSIONS)).astype(np.float32),
        "query_pid": q, "query_camid": 0 * q, "gallery_pid": g, "gallery_camid": 0 * g + 1,
    }  # fmt: skip


def long(rows: np.ndarray, length: float) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True) * length).astype(np.float32)


def changed(name: str, change: Callable[[np.ndarray], object]) -> Callable[[], dict]:
    return lambda: (found := arrays()) | {name: change(found[name])}


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[3] = value
        return values

    return change


BAD = {
    "a query of shape (D,)": (changed("query", lambda x: x[0]), r"query .* \(N, D\).* \(8,\)"),
    "a 0-dimensional query": (changed("query", lambda x: np.float32(1)), r"query .* shape \(\)"),
    "a gallery of three dimensions": (changed("gallery", lambda x: x[None]), r"gallery .* \(1, 20"),
    "D = 0": (changed("gallery", lambda x: x[:, :0]), r"gallery .* D at least 1.* \(20, 0\)"),
    "no query": (changed("query", lambda x: x[:0]), r"query .* N and D at least 1.* \(0, 8\)"),
    "other dimensions": (changed("query", lambda x: x[:, :5]), "5 dimensions, .* gallery 8"),
    "objects": (changed("query", lambda x: x.astype(object)), "query .* numbers .*not object"),
    "text": (changed("gallery", lambda x: x.astype(str)), "gallery .* numbers .*not <U"),
    "complex numbers": (changed("query", lambda x: x + 1j), "query .* numbers .*not complex"),
    "booleans": (changed("query", lambda x: x > 0), "query .* numbers .*not bool"),
    "NaN": (changed("gallery", with_value(np.nan)), r"gallery embedding 3 has NaN .*\(20, 8\)"),
    "infinity": (changed("query", with_value(-np.inf)), "query embedding 3 has NaN or infinite"),
    "numbers too large for float32": (
        changed("query", lambda x: x.astype(np.float64) * 1e300), "query embedding 0 has NaN or inf"
    ),
    "lengths of 1e30": (
        changed("query", lambda x: long(x, 1e30)), r"query embedding 0 has length.*\(6, 8\)"
    ),
    "denormal lengths": (
        changed("gallery", lambda x: long(x, 1e-40)), "gallery embedding 0 has length 1.0e-40"
    ),
    "fewer gallery labels": (
        lambda: arrays() | {"gallery_pid": np.arange(5), "gallery_camid": np.ones(5, int)},
        "gallery: 20 embeddings but 5 labels",
    ),
    "more gallery labels": (
        lambda: arrays() | {"gallery_pid": np.arange(40), "gallery_camid": np.ones(40, int)},
        "gallery: 20 embeddings but 40 labels",
    ),
    "fewer query labels": (
        lambda: arrays() | {"query_pid": np.arange(3), "query_camid": np.zeros(3, int)},
        "query: 6 embeddings but 3 labels",
    ),
    "fewer identities than cameras": (changed("query_pid", lambda x: x[:3]), "3 identities but"),
    "labels (N, 1)": (
        changed("gallery_pid", lambda x: x[:, None]),
        r"gallery_pid must be integers of shape \(N,\), .*int64 of shape \(20, 1\)",
    ),
    "0-dimensional labels": (changed("query_pid", lambda x: np.int64(1)), "query_pid must be int"),
    "float labels": (changed("gallery_pid", lambda x: x + 0.0), "gallery_pid .*not float64"),
    "boolean labels": (changed("gallery_camid", lambda x: x > 0), "gallery_camid .*not bool"),
    "object labels": (changed("query_pid", lambda x: x.astype(object)), "query_pid .*not object"),
    "text labels": (changed("query_pid", lambda x: x.astype(str)), "query_pid .*not <U"),
    "negative identities": (
        changed("gallery_pid", with_value(-1)), "gallery_pid .* from 0 up, but entry 3 of 20 is -1"
    ),
    "negative cameras": (changed("query_camid", with_value(-2)), "query_camid .*entry 3 .* is -2"),
    "identities too large": (
        changed("query_pid", lambda x: x.astype(np.uint64) + np.uint64(2**63)), "query_pid .* 0 of"
    ),
    "an empty gallery": (
        lambda: arrays() | {
            "gallery": np.zeros((0, 8)), "gallery_pid": np.array([]), "gallery_camid": np.array([])
        },
        "the gallery is empty",
    ),
}  # fmt: skip


def measured(given: dict, measures: Measures):
    query, gallery, *labels = given.values()
    return evaluate(query, gallery, Labels(*labels), measures)


@pytest.mark.parametrize("branch", ["plain", "rerank", "expand", "more"])
@pytest.mark.parametrize("case", BAD)
def test_evaluate_refuses_bad_arrays_on_every_branch(case, branch):
    given, message = BAD[case]
    with pytest.raises(DataError, match=message):
        measured(given(), BRANCHES[branch])


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("function", [rank, top_matches])
def test_ranking_refuses_bad_arrays(case, function):
    given, message = BAD[case]
    query, gallery, *labels = given().values()
    with pytest.raises(DataError, match=message):
        function(query, gallery, Labels(*labels))


@pytest.mark.parametrize("case", [case for case in BAD if "label" not in BAD[case][1]][:15])
def test_reranking_refuses_bad_arrays(case):
    given, message = BAD[case]
    both = given()
    with pytest.raises(DataError, match=message):
        list(rerank(both["query"], both["gallery"], Measures(k1=5, k2=2)))


@pytest.mark.parametrize("branch", ["plain", "rerank"])
@pytest.mark.parametrize("case", BAD)
def test_the_command_refuses_bad_npz_files(case, branch, tmp_path):
    given, message = BAD[case]
    found = given()
    if any(np.asarray(values).dtype == object for values in found.values()):
        message = "cannot be read as npz"
    names = {"query": "query_embedding", "gallery": "gallery_embedding"}
    np.savez(tmp_path / "bad.npz", **{names.get(key, key): found[key] for key in found})
    settings = Evaluate(embeddings=str(tmp_path / "bad.npz"), measures=BRANCHES[branch])
    with pytest.raises(DataError, match=message):
        evaluate_command(settings, Console(file=io.StringIO()))


COLUMNS = {
    "embedding": [[1.0, 2.0], [2.0, 1.0], [0.5, 1.0]], "pid": [1, 1, 2], "camid": [0, 1, 1],
    "split": ["query", "gallery", "gallery"],
}  # fmt: skip


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("branch", ["plain", "rerank"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": pa.array([[]] * 3, pa.list_(pa.float32()))}, "first embedding is empty"),
        ({"embedding": [["a"], ["b"], ["c"]]}, "must hold lists of float32"),
        ({"embedding": [1.0, 2.0, 3.0]}, "must hold lists of float32"),
        ({"pid": [1.0, 1.0, 2.0]}, "column pid must hold integers, not double"),
        ({"pid": [[1], [1], [2]]}, "column pid must hold integers, not list"),
        ({"pid": [1, -1, 2]}, "gallery_pid .*entry 0 of 2 is -1"),
        ({"split": [0, 1, 1]}, "column split must hold strings, not int64"),
        ({"split": ["gallery"] * 3}, "the query is empty"),
        ({"pid": [1, 2, 2]}, "no valid query"),
    ],
)
def test_the_command_refuses_bad_parquet_before_it_starts_workers(
    change, message, branch, workers, tmp_path
):
    pq.write_table(pa.table(COLUMNS | change), tmp_path / "bad.parquet")
    settings = Evaluate(
        embeddings=str(tmp_path / "bad.parquet"),
        workers=workers,
        measures=Measures(rerank=branch == "rerank", k1=1, k2=1),
    )
    with pytest.raises(DataError, match=message):
        evaluate_command(settings, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"embedding": [[1.0, 2.0], [np.nan, 1.0], [0.5, 1.0]]},
            r"embedding 1 has NaN .*array of shape \(3, 2\)",
        ),
        ({"embedding": [[1.0, 2.0], [2.0], [0.5, 1.0]]}, "an embedding of 1 dimensions"),
        ({"embedding": [[1.0, 2.0], None, [0.5, 1.0]]}, "an embedding of 0 dimensions"),
        (
            {"embedding": [[1.0, 2.0], [2.0, 1e30], [0.5, 1.0]]},
            r"embedding 1 has length 1.0e.*array of shape \(3, 2\)",
        ),
    ],
)
def test_the_command_refuses_bad_rows_of_parquet(change, message, tmp_path):
    pq.write_table(pa.table(COLUMNS | change), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=message):
        evaluate_command(
            Evaluate(embeddings=str(tmp_path / "bad.parquet")), Console(file=io.StringIO())
        )


@pytest.mark.parametrize("branch", ["euclidean", "all"])
@pytest.mark.parametrize(
    "dtype", ["float16", "float64", "longdouble", ">f4", "int8", "uint16", "int64"]
)
def test_any_real_numbers_are_taken(branch, dtype):
    found = arrays()
    for name in ("query", "gallery"):
        found[name] = np.asfortranarray((8 * found[name]).round().astype(dtype))
    expected = found | {name: np.float32(found[name]) for name in ("query", "gallery")}
    result = measured(found, BRANCHES[branch]).result
    assert result.summary() == measured(expected, BRANCHES[branch]).result.summary()


@pytest.mark.parametrize("length", [1.001e-30, 1e-20, 1.0, 0.999e18])
@pytest.mark.parametrize("branch", ["plain", "euclidean", "rerank", "more"])
def test_lengths_that_are_taken_do_not_change_the_ranking(branch, length):
    found, unit = arrays(), arrays()
    for name in ("query", "gallery"):
        found[name], unit[name] = long(found[name], length), long(unit[name], 1)
    result = measured(found, BRANCHES[branch]).result
    assert result.mAP == pytest.approx(measured(unit, BRANCHES[branch]).result.mAP, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rerank": True, "k1": 0}, "k1 ≥ 1"),
        ({"k1": 0}, "k1 ≥ 1"),
        ({"alpha": -1.0}, "finite α ≥ 0"),
        ({"rerank": True, "k2": -1}, "k2 ≥ 1"),
        ({"rerank": True, "k1": 26}, "needs at least 27 images .* not 26"),
        ({"rerank": True, "k1": 5, "k2": 27}, "needs at least 27 images"),
        ({"rerank": True, "weight": 1.01}, "0 ≤ λ ≤ 1"),
        ({"rerank": True, "weight": float("nan")}, "0 ≤ λ ≤ 1"),
        ({"rerank": True, "k1": 2.5}, "whole k1"),
        ({"expand": -1}, "--expand takes"),
        ({"expand": 21}, "1 ≤ k ≤ 20 gallery images, not 21"),
        ({"augment": 21}, "1 ≤ k ≤ 20 gallery images, not 21"),
        ({"expand": 1, "alpha": float("nan")}, "finite α ≥ 0"),
        ({"augment": 1, "alpha": float("inf")}, "finite α ≥ 0"),
        ({"max_rank": 0}, "--max-rank must lie between"),
        ({"max_rank": 10**12}, "--max-rank must lie between"),
        ({"false_accept_rates": (0.0,)}, r"lie in \(0, 1\)"),
        ({"false_accept_rates": (float("nan"),)}, r"lie in \(0, 1\)"),
        ({"metric": "manhattan"}, "no metric 'manhattan'"),
        ({"rerank": True, "camera_pairs": True}, "without re-ranking"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        measured(arrays(), Measures(**settings))
    found = arrays()
    names = {"query": "query_embedding", "gallery": "gallery_embedding"}
    path = str(Path(tmp_path) / "good.npz")
    np.savez(path, **{names.get(key, key): found[key] for key in found})
    with pytest.raises(ConfigError, match=message):
        evaluate_command(
            Evaluate(embeddings=path, measures=Measures(**settings)), Console(file=io.StringIO())
        )


@pytest.mark.parametrize("output", ["", "folder", "folder/", "s3://bucket/"])
def test_an_output_that_is_a_folder_is_refused_before_anything_is_read(
    output, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is a folder: give the name of a file"):
        evaluate_command(Evaluate(embeddings="none.npz", output=output), Console())


@pytest.mark.parametrize("name", ["batch", "workers"])
def test_no_workers_and_empty_batches_are_refused(name):
    with pytest.raises(ConfigError, match=f"--{name} must be at least 1, not 0"):
        evaluate_command(Evaluate(embeddings="none.npz", **{name: 0}), Console())
