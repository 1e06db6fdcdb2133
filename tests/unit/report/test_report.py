"""Pictures and report of a run: what is drawn, what is written, what is let in."""

from __future__ import annotations

import io
import json
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from rich.console import Console

from data_shards.building.build import build
from data_shards.dataset import Dataset
from data_shards.manifest import Names
from data_shards.records import NO_CAMERA
from data_shards.storage import atomic
from reid_train.evaluation.thresholds import Threshold, Thresholds
from reid_train.report import style
from reid_train.report.curves import draw_curves
from reid_train.report.embeddings import draw_embedding_map, overlay, project
from reid_train.report.factors import draw_factors, groups, save_factors, without_movement
from reid_train.report.page import Picture, Row, print_summary, write_page
from reid_train.report.pictures import draw_examples
from reid_train.report.ranks import FRAME, RIGHT, WRONG, draw_rank_list, layout
from reid_train.report.roc import draw_thresholds

NAMES = [
    "backbone.conv1.weight",
    "backbone.bn1.weight",
    "backbone.bn1.bias",
    "backbone.layer1.0.conv1.weight",
    "backbone.layer1.0.downsample.1.weight",
    "head.weight",
    "head.bias",
]
KINDS = ["kernel", "gamma", "beta", "kernel", "gamma", "kernel", "bias"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def rgb(colour: str) -> np.ndarray:
    return np.round(255 * np.asarray(to_rgb(colour))).astype(np.uint8)


def draw_ranks(path: Path, shape: tuple[int, int], correct: list[list[bool]]) -> None:
    image = np.full((*shape, 3), 90, np.uint8)
    draw_rank_list(
        path,
        [image] * len(correct),
        [[image] * len(row) for row in correct],
        correct,
        query_labels=[("pid 7", "cam 1")] * len(correct),
        gallery_labels=[[("pid 8", "cam 2")] * len(row) for row in correct],
        similarity=[[0.5] * len(row) for row in correct],
    )


def history(steps: int, epochs: int) -> dict[str, np.ndarray]:
    by_step = ("loss/cross_entropy", "loss/triplet", "loss/penalty", "learning_rate")
    columns = {name: np.linspace(3, 1, steps) for name in (*by_step, "images_per_second")}
    scores = {name: np.linspace(0, 0.5, epochs) for name in ("mAP", "rank-1", "mINP")}
    return {"step": np.arange(steps), **columns, "epoch": np.arange(epochs), **scores}


def decaying(steps: int, tensors: int) -> np.ndarray:
    pace = np.linspace(0.9, 1.1, tensors)
    return (0.0025 * np.exp(-np.linspace(0, 1, steps)[:, None] * pace)).astype(np.float32)


@pytest.mark.parametrize("shape", [(384, 128), (64, 64), (40, 160)])
def test_frames_are_green_where_right_and_red_where_wrong(tmp_path, shape):
    correct = [[True, False, True], [False, False, True]]
    draw_ranks(tmp_path / "ranks.png", shape, correct)
    picture = pixels(tmp_path / "ranks.png")
    image = np.zeros((*shape, 3), np.uint8)
    grid = layout([image] * 2, [[image] * 3] * 2)
    for row, answers in enumerate(correct):
        for column, right in enumerate(answers):
            left, top = grid.cell(row, column + 1)
            frame = picture[top + grid.height // 2, left - FRAME : left]
            assert (frame == rgb(RIGHT if right else WRONG)).all()


def test_right_and_wrong_differ_in_more_than_colour(tmp_path):
    marks = []
    for right in (True, False):
        draw_ranks(tmp_path / "ranks.png", (64, 64), [[right]])
        image = np.zeros((64, 64, 3), np.uint8)
        grid = layout([image], [[image]])
        left, top = grid.cell(0, 1)
        x = left + grid.width
        badge = pixels(tmp_path / "ranks.png")[top - 8 : top + 12, x - 12 : x + 8]
        marks.append((badge > 240).all(axis=2))
    assert marks[0].any()
    assert (marks[0] != marks[1]).sum() > 20


def test_image_of_another_shape_is_shown_whole(tmp_path):
    wide = np.full((20, 40, 3), 200, np.uint8)
    wide[:, 0] = wide[:, -1] = (255, 0, 0)
    tall = np.zeros((80, 40, 3), np.uint8)
    labels = {"query_labels": [("", "")], "gallery_labels": [[("", "")]], "similarity": [[0.1]]}
    path = tmp_path / "ranks.png"
    draw_rank_list(path, [tall], [[wide]], [[True]], **labels)
    grid = layout([tall], [[wide]])
    left, top = grid.cell(0, 1)
    middle = pixels(path)[top + grid.height // 2].astype(int)
    for x in (left, left + grid.width - 1):
        assert middle[x, 0] > middle[x, 1] + 50


def test_pictures_of_a_dataset_with_names_have_names(tmp_path, monkeypatch):
    lines, people = ["path,pid,camid,split"], ("anna", "ben", "cleo")
    for split, camera in (("query", "door"), ("gallery", "a long corridor")):
        for number, person in enumerate(people):
            image = np.full((24, 12, 3), 60 * number, np.uint8)
            Image.fromarray(image).save(tmp_path / f"{split}-{person}.png")
            lines.append(f"{split}-{person}.png,{person},{camera},{split}")
    (tmp_path / "people.csv").write_text("\n".join(lines))
    build("csv", tmp_path / "people.csv", str(tmp_path / "shards"), jobs=1)
    rows = np.arange(3)
    chosen = {
        "query": rows, "gallery": np.stack([rows, rows[::-1]], axis=1)[rows],
        "similarity": np.zeros((3, 2)), "map_row": rows, "map_embedding": np.eye(3),
    }  # fmt: skip
    drawn = {}
    monkeypatch.setattr(style, "save", lambda figure, path: drawn.update({path.name: figure}))
    draw_examples(tmp_path, Dataset.open(str(tmp_path / "shards")), "test", chosen, None)
    words = {name: {text.get_text() for text in drawn[name].findobj(Text)} for name in drawn}
    assert {"anna", "ben", "cleo", "door", "a lo…idor"} - words["rank_list.png"] == set()
    assert {"anna", "ben", "cleo", "a lon…rridor"} - words["embedding_map.png"] == set()
    assert not any("pid" in word or "cam " in word for names in words.values() for word in names)


def test_rows_may_be_short_and_queries_absent(tmp_path):
    draw_ranks(tmp_path / "short.png", (64, 64), [[True, False], [True], []])
    draw_ranks(tmp_path / "none.png", (64, 64), [])
    assert pixels(tmp_path / "short.png").std() > pixels(tmp_path / "none.png").std() > 0


def test_thresholds_are_drawn_with_and_without_any(tmp_path):
    at = (
        Threshold(1e-2, 0.4, 0.35, 0.45, 0.9, 0.85, 0.94),
        Threshold(1e-3, 0.6, 0.5, 0.7, 0, 0, 0),
    )
    curves = {
        "roc": ((1e-4, 0.2), (1e-2, 0.9), (1.0, 1.0)),
        "bins": (-1.0, 0.0, 0.5, 1.0),
        "genuine_bins": (0.0, 0.2, 0.8),
        "impostor_bins": (0.5, 0.4, 0.1),
    }
    draw_thresholds(tmp_path / "some.png", Thresholds(10_000, 100, 20, at, (), **curves))
    draw_thresholds(tmp_path / "none.png", Thresholds(100, 10, 2, (), (1e-2,), **curves))
    assert pixels(tmp_path / "some.png").shape == pixels(tmp_path / "none.png").shape
    assert (pixels(tmp_path / "some.png") != pixels(tmp_path / "none.png")).any()


@pytest.mark.parametrize(("steps", "epochs"), [(0, 0), (1, 1), (1, 0), (2, 1), (20, 4)])
def test_curves_of_any_length_are_drawn(tmp_path, steps, epochs):
    draw_curves(tmp_path / "curves.png", history(steps, epochs))
    assert pixels(tmp_path / "curves.png").shape[1] == 1440


def test_curves_of_a_diverged_run_are_drawn(tmp_path):
    diverged = {name: column.astype(float) for name, column in history(10, 3).items()}
    diverged["loss/triplet"][4:] = np.nan
    diverged["loss/penalty"][:] = 0
    diverged["loss/cross_entropy"][5] = np.inf
    draw_curves(tmp_path / "curves.png", diverged)
    draw_curves(tmp_path / "no_loss.png", {"step": np.arange(3)})
    assert pixels(tmp_path / "curves.png").std() > pixels(tmp_path / "no_loss.png").std() > 0


def test_curve_of_a_new_loss_is_drawn(tmp_path):
    draw_curves(tmp_path / "usual.png", history(10, 2))
    draw_curves(tmp_path / "more.png", history(10, 2) | {"loss/circle": np.linspace(9, 3, 10)})
    assert (pixels(tmp_path / "usual.png") != pixels(tmp_path / "more.png")).any()


def test_smoothed_line_ignores_a_spike(tmp_path):
    steady = history(500, 2)
    steady["images_per_second"] = np.full(500, 400.0)
    spiked = {name: column.copy() for name, column in steady.items()}
    spiked["images_per_second"][250] = 1.0
    draw_curves(tmp_path / "steady.png", steady)
    draw_curves(tmp_path / "spiked.png", spiked)
    change = np.abs(pixels(tmp_path / "steady.png").astype(int) - pixels(tmp_path / "spiked.png"))
    assert 20 < change.max() < 80  # the faint raw line has moved, the strong one has not


def draw(path: Path, values: np.ndarray, steps: np.ndarray | None = None) -> None:
    steps = np.arange(len(values)) if steps is None else steps
    draw_factors(path, NAMES, steps, values, kinds=KINDS)


@pytest.mark.parametrize("steps", [0, 1, 2, 20])
def test_factors_over_any_number_of_steps_are_drawn(tmp_path, steps):
    draw(tmp_path / "f.png", decaying(steps, len(NAMES)))
    assert pixels(tmp_path / "f.png").shape[1] == 1440


@pytest.mark.parametrize("fill", [0.0, 0.0025, np.nan])
def test_factors_that_never_move_are_drawn(tmp_path, fill):
    draw(tmp_path / "f.png", np.full((5, len(NAMES)), fill, np.float32))
    assert (tmp_path / "f.png").exists()


def falling(decay: float, steps: int = 50) -> np.ndarray:
    fall = np.linspace(0, decay, steps)[:, None]
    return np.repeat(0.0025 * (1 - fall), len(NAMES), axis=1)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.zeros((0, 7)), "no λ was recorded"),
        (falling(0.5)[:1], "λ was recorded at one step only, step 0: it is 2.5·10⁻³ for every"),
        (falling(0.0), "λ did not change over 50 recorded steps: it is 2.5·10⁻³ for every tensor"),
        (falling(2e-5), "λ changed by at most 2·10⁻³% over 50 recorded steps: it is 2.5·10⁻³"),
        (decaying(1, 7) * np.arange(7), "step 0: it is between 0 and 0.015"),
    ],
)
def test_factors_without_movement_are_a_sentence_instead_of_a_map(values, sentence):
    assert sentence in (without_movement(np.arange(len(values)), values) or "")


@pytest.mark.parametrize("decay", [3e-4, 0.01, 0.5])
def test_factors_that_move_are_a_map_in_full_colour_even_if_they_move_little(tmp_path, decay):
    assert without_movement(np.arange(50), falling(decay)) is None
    draw(tmp_path / "f.png", falling(decay))
    the_map = pixels(tmp_path / "f.png")[300:800, 220:640].astype(float)
    assert np.abs(the_map[:, 0] - the_map[:, -1]).mean() > 60


def test_factors_that_leave_zero_are_a_movement(tmp_path):
    values = falling(0.0)
    values[:10, 0] = 0
    assert without_movement(np.arange(50), values) is None
    draw(tmp_path / "f.png", values)


def test_full_size_factors_are_drawn_in_seconds_and_a_small_file(tmp_path):
    names = [f"backbone.layer{1 + i // 50}.{i % 50 // 3}.conv{i % 3}.weight" for i in range(202)]
    began = time.perf_counter()
    values = decaying(5000, 202)
    draw_factors(tmp_path / "f.png", names, np.arange(5000), values, kinds=["kernel"] * 202)
    assert time.perf_counter() - began < 6  # 0.4 s on an idle core
    assert (tmp_path / "f.png").stat().st_size < 1_500_000


def test_factors_are_stored_exactly(tmp_path):
    steps, values = np.array([0, 7, 40]), decaying(3, len(NAMES))
    save_factors(tmp_path / "factors.parquet", NAMES, steps, values)
    table = pq.read_table(tmp_path / "factors.parquet")
    assert table.column_names == ["step", *NAMES]
    assert table.schema.types == [pa.int64()] + [pa.float32()] * len(NAMES)
    columns = [column.to_numpy() for column in table.columns]
    np.testing.assert_array_equal(columns[0], steps)
    np.testing.assert_array_equal(np.stack(columns[1:], axis=1), values)


def test_slowly_moving_factors_take_less_room_than_their_floats(tmp_path):
    values = decaying(5000, 50)
    path = tmp_path / "factors.parquet"
    save_factors(path, [f"t{i}" for i in range(50)], np.arange(5000), values)
    assert path.stat().st_size < 0.75 * values.nbytes


def test_factors_of_the_wrong_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\(3, 7\)"):
        save_factors(tmp_path / "f", NAMES, np.arange(3), np.zeros((3, 6), np.float32))
    with pytest.raises(ValueError, match="kernel, bias, gamma, beta"):
        draw_factors(tmp_path / "f", ["a"], np.zeros(1), np.zeros((1, 1)), kinds=["weight"])
    assert not list(tmp_path.iterdir())


def test_tensors_are_grouped_by_stage_and_only_a_crowded_group_is_split():
    runs = groups(NAMES)
    assert [run[0] for run in runs] == ["backbone.conv1", "backbone.bn1", "backbone.layer1", "head"]
    assert [end - first for _, first, end in runs] == [1, 2, 2, 2]


@given(st.lists(st.sampled_from([*NAMES, "weight", "a.b.c.d.e", ""]), max_size=60))
def test_groups_cover_every_tensor_once(names):
    ends = [0]
    for _, first, end in groups(names):
        assert first == ends[-1] < end
        ends.append(end)
    assert ends[-1] == len(names)


@given(st.lists(st.floats(-1, 2), max_size=30), st.floats(0.001, 0.2))
def test_labels_are_spread_without_overlap_and_in_order(wanted, gap):
    placed = style.spread(wanted, gap, 0, 1)
    assert len(placed) == len(wanted)
    assert (placed >= -1e-9).all()
    assert (placed <= 1 + 1e-9).all()
    order = np.argsort(wanted, kind="stable")
    room = min(gap, 1 / max(len(wanted) - 1, 1))
    assert (np.diff(placed[order]) >= room - 1e-9).all()


def test_labels_with_room_stay_where_they_are_wanted():
    np.testing.assert_allclose(style.spread([0.7, 0.1], 0.1, 0, 1), [0.7, 0.1])


class Sources(HTMLParser):
    """Collects tags, links and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def write_sample(folder: Path, text: str) -> Sources:
    draw_curves(folder / "curves.png", {})
    write_page(
        folder / "report.html",
        text,
        [Row(text, 0.1, 0.5)],
        [Picture(folder / "curves.png", text)],
        {text: [text, Path("x")]},
        facts={text: text},
    )
    return Sources((folder / "report.html").read_text(encoding="utf-8"))


def test_page_needs_nothing_from_outside(tmp_path):
    page = write_sample(tmp_path, "run")
    assert len(page.sources) == 1
    assert page.sources[0].startswith("data:image/png;base64,")
    assert "url(" not in page.text
    assert not {"script", "link", "iframe"} & set(page.tags)


@settings(max_examples=15, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20))
@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x onerror=y>'])
def test_page_escapes_whatever_it_is_given(tmp_path_factory, hostile, text):
    page = write_sample(tmp_path_factory.mktemp("page"), text + hostile)
    assert page.tags.count("img") == 1
    assert "script" not in page.tags
    assert hostile in page.text


def test_page_shows_the_configuration_as_json(tmp_path):
    page = write_sample(tmp_path, "run")
    start = page.text.index("Configuration") + len("Configuration")
    assert json.loads(page.text[start:]) == {"run": ["run", "x"]}


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_page(path, "run", [], [], {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_same_data_gives_the_same_picture(tmp_path):
    for name in ("a.png", "b.png"):
        draw_curves(tmp_path / name, history(20, 3))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (Row("mAP", 0.021, 0.594), ("2.1%", "59.4%", "+57.3")),
        (Row("mAP", 0.5, 0.4), ("50.0%", "40.0%", "−10.0")),
        (Row("images/s", None, 1234.5, ""), ("–", "1,234", "–")),
        (Row("mINP", float("nan"), 0.1), ("–", "10.0%", "–")),
        (Row("time", 2.0, 2.0, "s"), ("2 s", "2 s", "±0 s")),
    ],
)
def test_row_is_printed_with_its_unit_and_change(row, cells):
    assert row.cells() == cells


def test_summary_prints_every_metric_and_no_markup(tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, width=80)
    print_summary(console, [Row("[red]mAP", 0.1, 0.5)], title="[bold]run")
    printed = screen.getvalue()
    for text in ("[bold]run", "[red]mAP", "10.0%", "50.0%", "+40.0"):
        assert text in printed


def test_shade_is_bright_where_the_activation_is_strong():
    activation = np.zeros((4, 4), np.float32)
    activation[0] = 1.0
    shaded = overlay(np.full((40, 40, 3), 100, np.uint8), activation)
    assert shaded[:8].mean() > 150
    assert (shaded[32:] == 100).all()


def test_same_embeddings_are_placed_alike_and_people_apart():
    draw = np.random.default_rng(0)
    pid = np.repeat(np.arange(3), 12)
    embedding = np.eye(8)[pid] + 0.02 * draw.standard_normal((36, 8))
    places = project(embedding)
    assert np.array_equal(places, project(embedding))
    near = np.linalg.norm(places[:, None] - places, axis=2) + 1e9 * np.eye(36)
    assert (pid[near.argmin(axis=1)] == pid).all()


@pytest.mark.parametrize("count", [1, 3, 5, 40])
def test_map_of_few_or_many_images_is_drawn(tmp_path, count):
    embedding = np.random.default_rng(0).standard_normal((count, 6))
    pid, camid = np.arange(count), np.where(np.arange(count) % 2, 3, NO_CAMERA + 1)
    names = Names(people={0: "_$a$", 3: "$x^$"})  # names, and no formulas
    draw_embedding_map(tmp_path / "map.png", embedding, pid, camid, names)
    assert len(np.unique(pixels(tmp_path / "map.png"))) > 20
