"""Draw what a model makes of a query and a gallery: rank lists, activations, a map."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from data_shards.dataset import Dataset
from data_shards.index import Index
from data_shards.loading.decode import decode
from data_shards.manifest import Names
from reid_train.model.embedder import Embedder
from reid_train.report.embeddings import draw_embedding_map, overlay
from reid_train.report.page import Picture
from reid_train.report.ranks import Label, draw_rank_list

FEWEST = 3  # people on a map: fewer show nothing


def draw_examples(
    folder: Path,
    dataset: Dataset,
    split: str,
    chosen: Mapping[str, np.ndarray],
    embedder: Embedder | None,
) -> list[Picture]:
    """Draw what was chosen into a folder; return the pictures.

    Args:
        split: "test" or "validation".
        chosen: what `choose_rank_list` and `choose_map` return, or part of it.
        embedder: the model, for its activations; None leaves them out.
    """
    query, gallery = dataset.evaluated(split)
    names = dataset.manifest.names or Names()

    def labels(index: Index, rows: np.ndarray) -> list[Label]:
        found = zip(index.pid[rows], index.camid[rows], strict=True)
        return [(names.person(pid), names.camera(camid)) for pid, camid in found]

    pictures = []
    if "query" in chosen:
        rows, matches = chosen["query"], chosen["gallery"]
        queries = [decode(dataset.read(query, row)) for row in rows]
        galleries = [[decode(dataset.read(gallery, match)) for match in row] for row in matches]
        draw = partial(
            draw_rank_list,
            correct=gallery.pid[matches] == query.pid[rows][:, None],
            query_labels=labels(query, rows),
            gallery_labels=[labels(gallery, row) for row in matches],
            similarity=chosen["similarity"],
        )
        path = folder / "rank_list.png"
        draw(path, queries, galleries)
        order = "from the highest average precision to the lowest"
        pictures.append(Picture(path, f"Queries of the {split} split, {order}."))
        if embedder is not None:
            path = folder / "activations.png"
            shaded = [_shaded(embedder, row) for row in (queries, *galleries)]
            title = "Where the network responds"
            draw(path, shaded[0], shaded[1:], title=title)
            caption = "The same images, bright where the last map of the global branch is strong."
            pictures.append(Picture(path, caption))
    rows = chosen.get("map_row", np.empty(0, int))
    if len(np.unique(gallery.pid[rows])) >= FEWEST:
        path = folder / "embedding_map.png"
        pid, camid = gallery.pid[rows], gallery.camid[rows]
        draw_embedding_map(path, chosen["map_embedding"], pid, camid, names)
        caption = f"Embeddings of some people of the {split} split, by identity and by camera."
        pictures.append(Picture(path, caption))
    return pictures


def _shaded(embedder: Embedder, images: list[np.ndarray]) -> list[np.ndarray]:
    found = embedder.activations(images)
    return [overlay(image, map_) for image, map_ in zip(images, found, strict=True)]
