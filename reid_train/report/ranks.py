"""Draw rank lists: a grid of queries, each with the gallery images that are most similar to it.

The grid is composed in pixels and drawn without scaling, so photographs are resampled only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path as Outline
from PIL import Image, ImageOps

from reid_train.report import style

RIGHT, WRONG = style.GREEN, style.RED
FRAME = 4  # pixels
_MARGIN, _HEADER, _LABELS, _GAP, _CAPTION, _QUERY_GAP = 36, 128, 112, 14, 40, 44  # pixels
_TICK = Outline(np.array([(-0.45, 0.0), (-0.12, -0.35), (0.5, 0.4)]), [1, 2, 2])
_CROSS = Outline(np.array([(-0.4, -0.4), (0.4, 0.4), (-0.4, 0.4), (0.4, -0.4)]), [1, 2, 1, 2])


@dataclass(frozen=True)
class Layout:
    """Positions of the cells of a grid, in pixels from the top left."""

    rows: int
    columns: int
    width: int  # of an image without its frame
    height: int

    def cell(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of an image; column 0 is the query, column r the r-th most similar."""
        left = _MARGIN + _LABELS + column * (self.width + _GAP) + (_QUERY_GAP if column else 0)
        return left, _HEADER + row * (self.height + _CAPTION)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole picture."""
        left, top = self.cell(self.rows, self.columns + 1)
        # Wide enough for the heading however few columns there are.
        return max(left - _GAP + _MARGIN, 900), max(top, _HEADER + 40) + _MARGIN // 2


def layout(
    query_images: Sequence[np.ndarray], gallery_images: Sequence[Sequence[np.ndarray]]
) -> Layout:
    """Choose the size of the cells from the shape of the images, about equal in area."""
    ratios = [image.shape[0] / image.shape[1] for image in query_images]
    ratio = float(np.median(ratios)) if ratios else 1.0
    width = int(np.clip(240 / ratio, 80, 104))
    columns = max((len(row) for row in gallery_images), default=0)
    return Layout(len(query_images), columns, width, max(48, round(width * ratio)))


def draw_rank_list(
    path: Path,
    query_images: Sequence[np.ndarray],
    gallery_images: Sequence[Sequence[np.ndarray]],
    correct: Sequence[Sequence[bool]] | np.ndarray,
    *,
    query_pid: Sequence[int] | np.ndarray,
    query_camid: Sequence[int] | np.ndarray,
    gallery_camid: Sequence[Sequence[int]] | np.ndarray,
    similarity: Sequence[Sequence[float]] | np.ndarray,
    title: str = "Rank lists",
) -> None:
    """Draw one row for each query: the query, then the gallery images most similar to it.

    A correct match has a green frame and a tick, a wrong one a red frame and a cross.

    Args:
        path: the PNG file to write.
        query_images: Q images, (H, W, 3) uint8 RGB; sizes may differ.
        gallery_images: Q rows of images, most similar first, without junk; rows may be short.
        correct: whether each gallery image shows the query's identity.
        query_pid: identity of each query.
        query_camid: camera of each query.
        gallery_camid: camera of each gallery image.
        similarity: cosine similarity of each gallery image to its query.
        title: heading of the picture.
    """
    grid = layout(query_images, gallery_images)
    canvas = _compose(grid, query_images, gallery_images, correct)
    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / style.DPI, height / style.DPI), dpi=style.DPI)
    FigureCanvasAgg(figure)
    figure.figimage(canvas, zorder=-1)  # below the text
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    queries = "1 query" if grid.rows == 1 else f"{grid.rows} queries"
    note = f"{queries}, each with the gallery images that are most similar to it"
    style.heading(figure, title, note, left=_MARGIN / style.DPI, top=0.17)
    _legend(axes, grid)
    for row in range(grid.rows):
        _label_row(axes, grid, row, int(query_pid[row]), int(query_camid[row]))
        for rank in range(1, len(gallery_images[row]) + 1):
            camid, score = int(gallery_camid[row][rank - 1]), float(similarity[row][rank - 1])
            _caption(axes, grid, row, rank, camid, score)
    _marks(axes, grid, correct, gallery_images)
    style.save(figure, path)


def _compose(
    grid: Layout,
    query_images: Sequence[np.ndarray],
    gallery_images: Sequence[Sequence[np.ndarray]],
    correct: Sequence[Sequence[bool]] | np.ndarray,
) -> np.ndarray:
    """The images and frames of a grid on white, (height, width, 3) uint8."""
    canvas = Image.new("RGB", grid.size, style.PAPER)

    def paste(row: int, column: int, image: np.ndarray, colour: str) -> None:
        # The whole image in its own shape, on grey where the cell is larger.
        whole = ImageOps.pad(
            Image.fromarray(image),
            (grid.width, grid.height),
            Image.Resampling.LANCZOS,
            color=style.GRID,
        )
        left, top = grid.cell(row, column)
        canvas.paste(ImageOps.expand(whole, FRAME, colour), (left - FRAME, top - FRAME))

    for row, query in enumerate(query_images):
        paste(row, 0, query, style.INK)
        for column, image in enumerate(gallery_images[row]):
            paste(row, column + 1, image, RIGHT if correct[row][column] else WRONG)
    return np.asarray(canvas)


def _legend(axes: Axes, grid: Layout) -> None:
    right = grid.size[0] - _MARGIN
    for x, colour, mark, text in (
        (right - 330, RIGHT, _TICK, "same identity"),
        (right - 158, WRONG, _CROSS, "another identity"),
    ):
        _badges(axes, [(x, 68)], colour, mark)
        axes.text(x + 18, 68, text, size=style.TEXT, color=style.INK, va="center_baseline")
    if not grid.rows:
        axes.text(_MARGIN, _HEADER, "no query to show", size=style.TEXT, color=style.MUTED)
        return
    for column in range(grid.columns + 1):
        x = grid.cell(0, column)[0] + grid.width / 2
        text = str(column) if column else "query"
        axes.text(x, _HEADER - 16, text, size=style.SMALL, color=style.MUTED, ha="center")


def _label_row(axes: Axes, grid: Layout, row: int, pid: int, camid: int) -> None:
    left, top = grid.cell(row, 0)
    x, middle = left - 18, top + grid.height / 2
    text: dict[str, Any] = {"ha": "right", "va": "center"}
    axes.text(x, middle - 14, f"pid {pid}", size=style.TEXT, weight="bold", color=style.INK, **text)
    axes.text(x, middle + 14, f"cam {camid}", size=style.SMALL, color=style.MUTED, **text)


def _caption(axes: Axes, grid: Layout, row: int, rank: int, camid: int, score: float) -> None:
    left, top = grid.cell(row, rank)
    right, y = left + grid.width, top + grid.height + FRAME + 6
    axes.text(left, y, f"cam {camid}", size=5.8, color=style.MUTED, va="top", ha="left")
    axes.text(right, y, f"{score:.3f}", size=5.8, color=style.INK, va="top", ha="right")


def _marks(
    axes: Axes,
    grid: Layout,
    correct: Sequence[Sequence[bool]] | np.ndarray,
    gallery_images: Sequence[Sequence[np.ndarray]],
) -> None:
    for wanted, colour, mark in ((True, RIGHT, _TICK), (False, WRONG, _CROSS)):
        corners = [
            (left + grid.width - 2, top + 2)
            for row, images in enumerate(gallery_images)
            for column in range(len(images))
            if bool(correct[row][column]) is wanted
            for left, top in [grid.cell(row, column + 1)]
        ]
        _badges(axes, corners, colour, mark)


def _badges(axes: Axes, centres: Sequence[tuple[float, float]], colour: str, mark: Outline) -> None:
    """Draw discs with a tick or a cross, for readers and printers without green and red."""
    if not centres:
        return
    x, y = np.asarray(centres, dtype=float).T
    axes.scatter(x, y, s=90, color=colour, edgecolor=style.PAPER, linewidth=1.0, zorder=3)
    axes.scatter(
        x, y, s=20, marker=mark, facecolor="none", edgecolor=style.PAPER, linewidth=1.1, zorder=4
    )
