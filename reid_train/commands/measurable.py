"""What can be measured: a sharded dataset, or a folder of images whose paths say who is on them."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError
from data_shards.images import ImageFolder
from data_shards.records import NO_CAMERA
from reid_train.evaluation.embedding_store import EmbeddingFiles
from reid_train.evaluation.ground_truth import Labels

LAYOUT = "ID/photo.jpg, or query/ID/photo.jpg and gallery/ID/photo.jpg"


class FolderLabels(NamedTuple):
    """Which images are queries and which gallery, as rows of the folder, and their labels."""

    query: np.ndarray  # (Q,) int64
    gallery: np.ndarray  # (G,) int64
    labels: Labels


def folder_labels(paths: Sequence[str] | np.ndarray) -> FolderLabels:
    """Read identities off the paths of a folder's images.

    With `query/ID/…` and `gallery/ID/…`, these are the query and the gallery. Otherwise the paths
    are `ID/…`, and each image is a query for all others. Cameras are not known, so a query's own
    image is all that is left out of its gallery.

    Raises:
        DataError: an image lies elsewhere.
    """
    parts = [path.split("/") for path in paths]
    divided = any(first in ("query", "gallery") for first, *_ in parts)
    for path, names in zip(paths, parts, strict=True):
        if len(names) != 2 + divided or (divided and names[0] not in ("query", "gallery")):
            raise DataError(
                f"{path} does not say whose photo it is: the folder must hold {LAYOUT}; or build "
                "a dataset of it with `data_shards build`"
            )
    _, pid = np.unique([names[-2] for names in parts], return_inverse=True)
    rows = np.arange(len(parts))
    query = gallery = rows
    if divided:
        is_query = np.array([names[0] == "query" for names in parts])
        query, gallery = rows[is_query], rows[~is_query]
    camid = NO_CAMERA + rows  # an image of its own camera each
    return FolderLabels(
        query, gallery, Labels(pid[query], camid[query], pid[gallery], camid[gallery])
    )


def folder_embeddings(url: str) -> tuple[np.ndarray, np.ndarray, Labels]:
    """Query and gallery embeddings that `embed` made of a folder, and their labels."""
    files = EmbeddingFiles.open(url)
    found = folder_labels(files.paths())
    embedding = files.read("gallery")  # the split of all images of a folder
    return embedding[found.query], embedding[found.gallery], found.labels


def labels_of(data: Dataset | ImageFolder, split: str) -> Labels:
    """The labels of a query and a gallery; `split` is "test" or "validation".

    Raises:
        ConfigError: a folder has no validation split.
        DataError: there is no query or no gallery.
    """
    if isinstance(data, ImageFolder):
        if split == "validation":
            raise ConfigError(f"{data.url} is a folder of images: leave out --split validation")
        return folder_labels(data.path).labels
    query, gallery = data.evaluated(data.choose_split(split))
    return Labels(query.pid, query.camid, gallery.pid, gallery.camid)


def name_of(data: Dataset | ImageFolder) -> str:
    """The name of a dataset, or of a folder."""
    return PurePosixPath(data.url).name if isinstance(data, ImageFolder) else data.manifest.name


def digests_of(data: Dataset | ImageFolder, split: str) -> dict[str, str]:
    """Digests of what is measured, by their names among the tags of a run."""
    if isinstance(data, ImageFolder):
        return {"images_digest": data.digest}
    manifest = data.manifest
    digests = {"manifest_digest": manifest.digest, "evaluation_digest": manifest.evaluation_digest}
    if split == "validation":
        digests["validation_digest"] = manifest.validation_digest
    return digests
