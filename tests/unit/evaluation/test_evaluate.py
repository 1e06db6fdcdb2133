"""Evaluate embeddings from a file: what is printed and written."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_shards.errors import ConfigError, DataError
from reid_train.commands.evaluate import Evaluate, evaluate, show, show_all
from reid_train.commands.memory import memory_needed, say_needed
from reid_train.evaluation.measures import Measures

GOLDEN = Path(__file__).parents[2] / "golden" / "evaluation.npz"


def evaluated(measures: Measures, output: str | None = None):
    console = Console(file=io.StringIO(), width=200)
    settings = Evaluate(embeddings=str(GOLDEN), measures=measures, output=output)
    return evaluate(settings, console)[0], console.file.getvalue()


@pytest.mark.parametrize(("rerank", "mAP"), [(False, "mAP"), (True, "reranked_mAP")])
def test_the_golden_file_is_measured(rerank, mAP):
    found, printed = evaluated(Measures(rerank=rerank))
    expected = float(np.load(GOLDEN)[mAP])
    assert found.result.mAP == pytest.approx(expected, abs=1e-6)
    assert f"{100 * expected:.2f} %" in printed
    assert "120 queries × 900 gallery images × 48 dimensions: at most about" in printed
    assert "12 queries without a match were left out" in printed


def test_thresholds_are_shown_and_written(tmp_path):
    path, console = tmp_path / "metrics.json", Console(file=io.StringIO(), width=200)
    (found,) = evaluate(
        Evaluate(embeddings=str(GOLDEN), thresholds=True, output=str(path)), console
    )
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert found.thresholds is not None
    assert f"{found.thresholds.at[0].similarity:.4f}" in printed
    assert "too few pairs for 1e-05: it needs 3,000,000" in printed
    written = json.loads(path.read_text())["thresholds"]
    assert written["at"][0]["similarity"] == found.thresholds.at[0].similarity
    assert 1e-5 in written["too_few"]


def test_the_measurement_is_written_as_json(tmp_path):
    path = tmp_path / "out" / "metrics.json"
    found, _ = evaluated(
        Measures(camera_pairs=True, false_accept_rates=(0.01,), expand=3, augment=3), str(path)
    )
    written = json.loads(path.read_text())
    assert written["embeddings"] == str(GOLDEN)
    assert written["metrics"] == found.result.summary()
    assert "TAR@FAR=0.01" in written["metrics"]
    assert written["measures"]["expand"] == 3
    assert {pair["query"] != pair["gallery"] for pair in written["camera_pairs"]} == {True}


def test_camera_pairs_have_the_names_of_cameras():
    found, printed = evaluated(Measures(camera_pairs=True))
    (a, b), console = next(iter(found.pairs)), Console(file=io.StringIO(), width=200)
    assert re.search(rf"^ *{a} +{b} ", printed, re.MULTILINE)
    show(found, console, {b: "hall [west]"})
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(rf"^ *{a} +hall \[west\] ", printed, re.MULTILINE)


def test_reranking_shows_and_writes_the_plain_ranking_beside_it(tmp_path):
    path = tmp_path / "metrics.json"
    found, printed = evaluated(Measures(rerank=True), str(path))
    golden = np.load(GOLDEN)
    assert found.plain.mAP == pytest.approx(float(golden["mAP"]), abs=1e-6)
    for name in ("mAP", "reranked_mAP"):
        assert f"{100 * float(golden[name]):.2f} %" in printed
    assert json.loads(path.read_text())["metrics_before_reranking"] == found.plain.summary()


@pytest.mark.parametrize("name", ["r50[bf16].npz", "[/b].npz", "[red]a.npz"])
def test_square_brackets_in_names_are_printed_as_they_are(name, tmp_path):
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)  # a name with a slash is a folder and a file
    place.write_bytes(GOLDEN.read_bytes())
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    evaluate(Evaluate(embeddings=str(place), output=f"{place}.json"), console)
    assert f"written to {place}.json" in console.file.getvalue()


def test_several_models_have_a_row_each_with_all_datasets_and_the_mean():
    console = Console(file=io.StringIO(), width=200)
    found = [evaluated(Measures(metric=m))[0] for m in ("cosine", "euclidean")]
    # Of the models a and b on the datasets left and right.
    models = ["s3://bucket/runs/a", "s3://bucket/runs/b"]
    show_all(models, ["left", "right"], [found[0], found[1], found[1], found[1]], console)
    assert "models in s3://bucket/runs/\n" in console.file.getvalue()  # type: ignore[attr-defined]
    rows = {line.split()[0]: line for line in console.file.getvalue().splitlines() if "%" in line}  # type: ignore[attr-defined]
    (cosine, _), (euclidean, first) = ((100 * f.result.mAP, 100 * f.result.cmc[0]) for f in found)
    mean = (cosine + euclidean) / 2
    assert re.findall(r"[\d.]+(?= %)", rows["a"])[::2] == [
        f"{value:.2f}" for value in (cosine, euclidean, mean)
    ]
    assert re.findall(r"[\d.]+(?= %)", rows["b"]) == 3 * [f"{euclidean:.2f}", f"{first:.2f}"]


def test_reranking_is_not_broken_down():
    with pytest.raises(ConfigError, match="without re-ranking"):
        evaluated(Measures(rerank=True, camera_pairs=True))


def test_a_query_of_another_model_is_an_error(tmp_path):
    arrays = dict(np.load(GOLDEN))
    arrays["query_embedding"] = arrays["query_embedding"][:, :40]
    np.savez(tmp_path / "mixed.npz", **arrays)
    with pytest.raises(DataError, match="40 dimensions, those of the gallery 48"):
        evaluate(
            Evaluate(embeddings=str(tmp_path / "mixed.npz"), measures=Measures(rerank=True)),
            Console(file=io.StringIO()),
        )


def test_memory_needed_keeps_within_what_is_promised():
    msmt17 = 11_659, 82_161, 2048
    assert memory_needed(*msmt17, Measures()).driver < 4e9
    assert memory_needed(*msmt17, Measures(rerank=True)).driver < 8e9
    assert memory_needed(3_368, 19_732, 2048, Measures(rerank=True)).driver < 2.5e9


def test_workers_that_rank_do_not_hold_the_gallery():
    msmt17 = memory_needed(11_659, 82_161, 2048, Measures(), workers=8)
    twice = memory_needed(11_659, 2 * 82_161, 2048, Measures(), workers=8)
    assert msmt17 == twice


def test_the_driver_does_not_hold_what_is_reranked():
    needed = [
        memory_needed(1000, 50_000, dimensions, Measures(rerank=True), workers=8)
        for dimensions in (256, 2048)
    ]
    assert needed[0].driver == needed[1].driver
    assert needed[0].worker < needed[1].worker
    assert needed[0].node < needed[1].node


def test_npz_is_measured_in_one_process_and_a_line_says_so():
    console = Console(file=io.StringIO(), width=200)
    evaluate(Evaluate(embeddings=str(GOLDEN), workers=3), console)
    assert "npz files are measured in one process" in console.file.getvalue()


def test_the_memory_of_each_process_is_printed():
    console = Console(file=io.StringIO(), width=300)
    say_needed(11_659, 82_161, 2048, Measures(rerank=True), console, workers=3)
    assert "GB in each of 3 workers" in console.file.getvalue()
