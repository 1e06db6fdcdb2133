"""Draw embeddings: as a map in the plane, and where in the images they come from."""

from pathlib import Path

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection

from data_shards.manifest import Names
from data_shards.records import NO_CAMERA
from reid_train.report import style

HEAT = colormaps["inferno"]
SHADE = 0.6  # opacity of the strongest response
COLOURS = [*colormaps["tab20"].colors[::2], *colormaps["tab20"].colors[1::2]]  # type: ignore[attr-defined]
PERPLEXITY = 30.0  # about how many neighbours t-SNE keeps together


def project(embedding: np.ndarray) -> np.ndarray:
    """Place embeddings (N, D) in the plane with t-SNE, (N, 2): near ones stay near.

    Distances between far groups mean nothing (van der Maaten, Hinton, JMLR 2008). The same
    embeddings give the same places.
    """
    from sklearn.manifold import TSNE

    rows = embedding.astype(np.float32)
    if len(rows) < 5:  # too few for neighbours
        return np.stack([np.arange(len(rows)), np.zeros(len(rows))], axis=1)
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(rows)


def draw_embedding_map(
    path: Path, embedding: np.ndarray, pid: np.ndarray, camid: np.ndarray, names: Names
) -> None:
    """Draw one point for each image, coloured by identity on the left and by camera on the right.

    Args:
        embedding: (N, D), of unit length for the cosine.
        pid, camid: (N,) identities and cameras; from `NO_CAMERA` up a camera is not known.
        names: of those that have names.
    """
    people = style.count(len(np.unique(pid)), "person").replace("persons", "people")
    note = f"{style.count(len(pid), 'image')} of {people}, placed by t-SNE: neighbours are similar"
    figure = style.new_figure(10, 5.2, "Embeddings", note)
    left, right = figure.subplots(1, 2)
    places = project(embedding)
    _scatter(left, "By identity", places, [names.person(p) for p in pid], pid)
    known = np.minimum(camid, NO_CAMERA)
    cameras = [names.camera(c) or "not known" for c in known]
    _scatter(right, "By camera", places, cameras, known)
    style.save(figure, path)


def _scatter(
    axes: Axes, title: str, places: np.ndarray, names: list[str], kind: np.ndarray
) -> None:
    style.panel(axes, title)
    labels = dict[PathCollection, str]()
    for number, value in enumerate(np.unique(kind)):
        rows = np.flatnonzero(kind == value)
        # Twenty colours; after them, another shape.
        marker = "osD^v"[number // len(COLOURS) % 5]
        points = axes.scatter(
            *places[rows].T, s=16, color=COLOURS[number % len(COLOURS)], marker=marker,
            linewidths=0, alpha=0.85,
        )  # fmt: skip
        labels[points] = names[rows[0]]
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    legend = axes.legend(
        list(labels), [""] * len(labels),
        frameon=False, fontsize=style.SMALL - 1, labelcolor=style.MUTED, ncols=5,
        loc="upper center", bbox_to_anchor=(0.5, 0.0), handletextpad=0.1, columnspacing=0.8,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), labels.values(), strict=True):
        text.set_parse_math(False)  # a name is no formula, and may begin with _
        text.set_text(style.shorten(name))


def overlay(image: np.ndarray, activation: np.ndarray) -> np.ndarray:
    """Shade an image (H, W, 3) uint8 by an activation (h, w): bright is where it is strong.

    Each image has its own scale, from the weakest of its values to the strongest.
    """
    low, high = float(activation.min()), float(activation.max())
    scaled = (activation - low) / max(high - low, 1e-12)
    height, width = image.shape[:2]
    scaled = cv2.resize(scaled.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    strength = np.clip(scaled, 0, 1)[..., None]
    grey = image.mean(axis=2, keepdims=True)
    heat = 255 * HEAT(strength[..., 0])[..., :3]
    return (grey + SHADE * strength * (heat - grey)).round().astype(np.uint8)
