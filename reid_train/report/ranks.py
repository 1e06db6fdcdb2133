"""Draw rank lists: a grid of queries, each with the gallery images that are most similar to it.

The grid is composed in pixels and drawn without scaling, so photographs are resampled only once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path as Outline
from PIL import Image, ImageOps

from reid_train.report import style

RIGHT, WRONG = style.GREEN, style.RED
FRAME = 4  # pixels
_MARGIN, _HEADER, _LABELS, _GAP, _CAPTION, _QUERY_GAP = 36, 128, 112, 14, 54, 44  # pixels
_LETTER, _SCORE = 7, 38  # pixels of a letter and of a similarity, below an image
_TICK = Outline(np.array([(-0.45, 0.0), (-0.12, -0.35), (0.5, 0.4)]), [1, 2, 2])
_CROSS = Outline(np.array([(-0.4, -0.4), (0.4, 0.4), (-0.4, 0.4), (0.4, -0.4)]), [1, 2, 1, 2])
_BADGES = {True: (RIGHT, _TICK), False: (WRONG, _CROSS)}
Label = tuple[str, str]  # who or which file, and which camera or folder; empty if not known
IDENTITY, PERSON = ("same identity", "another identity"), ("same person", "another person")


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
    correct: Sequence[Sequence[bool]] | np.ndarray | None,
    *,
    query_labels: Sequence[Label],
    gallery_labels: Sequence[Sequence[Label]],
    similarity: Sequence[Sequence[float]] | np.ndarray,
    meaning: tuple[str, str] = IDENTITY,
    title: str = "Rank lists",
) -> None:
    """Draw one row for each query: the query, then the gallery images most similar to it.

    A correct match has a green frame and a tick, a wrong one a red frame and a cross.

    Args:
        query_images: Q images, (H, W, 3) uint8 RGB; sizes may differ.
        gallery_images: Q rows of images, most similar first, without junk; rows may be short.
        correct: whether each gallery image shows the query's identity; None if not known.
        query_labels, gallery_labels: what stands beside each query and below each gallery image.
        similarity: cosine similarity of each gallery image to its query.
        meaning: what a tick and a cross mean, for the legend.
    """
    grid = layout(query_images, gallery_images)
    width, height = grid.size
    figure = Figure(figsize=(width / style.DPI, height / style.DPI), dpi=style.DPI)
    canvas = Image.new("RGB", grid.size, style.PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    queries = "1 query," if grid.rows == 1 else f"{grid.rows} queries, each"
    note = f"{queries} with the gallery images that are most similar to it"
    style.heading(figure, title, note, left=_MARGIN / style.DPI, top=0.17)
    _legend(axes, grid, meaning if correct is not None else ())
    corners: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for row, query in enumerate(query_images):
        _paste(canvas, grid, row, 0, query, style.INK)
        _label_row(axes, grid, row, *query_labels[row])
        for column, image in enumerate(gallery_images[row]):
            left, top = grid.cell(row, column + 1)
            frame = style.FAINT
            if correct is not None:
                right = bool(correct[row][column])
                frame = _BADGES[right][0]
                corners[right].append((left + grid.width - 2, top + 2))
            _paste(canvas, grid, row, column + 1, image, frame)
            below: dict[str, Any] = {"size": 5.8, "va": "top", "parse_math": False}
            y, (name, camera) = top + grid.height + FRAME + 5, gallery_labels[row][column]
            room, score = grid.width / _LETTER, float(similarity[row][column])
            axes.text(left, y, style.shorten(name, room), color=style.INK, **below)
            camera = style.shorten(camera, room - _SCORE / _LETTER)
            axes.text(left, y + 15, camera, color=style.MUTED, **below)
            below["ha"] = "right"
            axes.text(left + grid.width, y + 15, f"{score:.3f}", color=style.INK, **below)
    for right, centres in corners.items():
        _badges(axes, centres, *_BADGES[right])
    figure.figimage(np.asarray(canvas), zorder=-1)  # below the text
    style.save(figure, path)


def _paste(
    canvas: Image.Image, grid: Layout, row: int, column: int, image: np.ndarray, colour: str
) -> None:
    """Paste a whole image in its own shape and in a frame, on grey where the cell is larger."""
    size, filtering = (grid.width, grid.height), Image.Resampling.LANCZOS
    whole = ImageOps.pad(Image.fromarray(image), size, filtering, color=style.GRID)
    left, top = grid.cell(row, column)
    canvas.paste(ImageOps.expand(whole, FRAME, colour), (left - FRAME, top - FRAME))


def _legend(axes: Axes, grid: Layout, meaning: Sequence[str]) -> None:
    for offset, badge, text in zip((330, 158), _BADGES.values(), meaning, strict=False):
        x = grid.size[0] - _MARGIN - offset
        _badges(axes, [(x, 68)], *badge)
        axes.text(x + 18, 68, text, size=style.TEXT, color=style.INK, va="center_baseline")
    if not grid.rows:
        axes.text(_MARGIN, _HEADER, "no query to show", size=style.TEXT, color=style.MUTED)
        return
    for column in range(grid.columns + 1):
        x = grid.cell(0, column)[0] + grid.width / 2
        text = str(column) if column else "query"
        axes.text(x, _HEADER - 16, text, size=style.SMALL, color=style.MUTED, ha="center")


def _label_row(axes: Axes, grid: Layout, row: int, name: str, camera: str) -> None:
    left, top = grid.cell(row, 0)
    x, middle = left - 18, top + grid.height / 2
    text: dict[str, Any] = {"ha": "right", "va": "center", "parse_math": False}
    name, camera = style.shorten(name), style.shorten(camera)
    axes.text(x, middle - 14, name, size=style.TEXT, weight="bold", color=style.INK, **text)
    axes.text(x, middle + 14, camera, size=style.SMALL, color=style.MUTED, **text)


def _badges(axes: Axes, centres: Sequence[tuple[float, float]], colour: str, mark: Outline) -> None:
    """Draw discs with a tick or a cross, for readers and printers without green and red."""
    if not centres:
        return
    x, y = zip(*centres, strict=True)
    paper: dict[str, Any] = {"edgecolor": style.PAPER}
    axes.scatter(x, y, s=90, color=colour, linewidth=1.0, zorder=3, **paper)
    axes.scatter(x, y, s=20, marker=mark, facecolor="none", linewidth=1.1, zorder=4, **paper)
