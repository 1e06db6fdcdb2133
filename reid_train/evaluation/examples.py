"""Choose what a person looks at: a few queries with their matches, and some people for a map."""

from dataclasses import replace

import numpy as np

from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.measures import Metric
from reid_train.evaluation.ranking import RankingResult, top_matches

QUERIES, MATCHES = 8, 10  # rows and columns of a rank list
PEOPLE, IMAGES = 20, 20  # most people on a map of embeddings, and images of each


def choose_rank_list(
    query: np.ndarray,
    gallery: np.ndarray,
    labels: Labels,
    result: RankingResult,
    metric: Metric = "cosine",
) -> dict[str, np.ndarray]:
    """Choose queries evenly from the best average precision to the worst, with their matches.

    Args:
        query, gallery: (Q, D), (G, D) float32 embeddings.
        result: what ranking them gave.

    Returns:
        "query": (q,) rows; "gallery": (q, k) rows, most similar first, without junk;
        "similarity": (q, k) cosine similarities.
    """
    rows = _spread(result.average_precision)
    shown = replace(labels, query_pid=labels.query_pid[rows], query_camid=labels.query_camid[rows])
    matches = top_matches(query[rows], gallery, shown, k=MATCHES, metric=metric)
    similarity = _cosine(query[rows], gallery[matches])
    return {"query": rows, "gallery": matches, "similarity": similarity}


def choose_map(gallery: np.ndarray, labels: Labels) -> dict[str, np.ndarray]:
    """Choose the images of a map: of the queried people whom the most cameras saw.

    Of equals those with more images come first. A person has at most `IMAGES` images, evenly from
    all of theirs.

    Returns:
        "map_row": (n,) rows of the gallery; "map_embedding": (n, D) float16, of unit length.
    """
    queried = np.flatnonzero(np.isin(labels.gallery_pid, labels.query_pid))
    pids, person = np.unique(labels.gallery_pid[queried], return_inverse=True)
    seen = np.unique(np.stack([person, labels.gallery_camid[queried]]), axis=1)[0]
    cameras = np.bincount(seen, minlength=len(pids))
    images = np.bincount(person, minlength=len(pids))
    chosen = []
    for number in np.lexsort((pids, -images, -cameras))[:PEOPLE]:
        own = queried[person == number]
        chosen.append(own[np.linspace(0, len(own) - 1, min(IMAGES, len(own))).astype(int)])
    rows = np.concatenate(chosen) if chosen else np.empty(0, int)
    embedding = gallery[rows].astype(np.float32)
    length = np.linalg.norm(embedding, axis=1, keepdims=True)
    return {
        "map_row": rows,
        "map_embedding": (embedding / np.maximum(length, 1e-12)).astype(np.float16),
    }


def _cosine(query: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Return the cosine similarity (q, k) of queries (q, D) and their matches (q, k, D)."""
    products = np.einsum("qd,qkd->qk", query, matches)
    lengths = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(matches, axis=2)
    return products / np.maximum(lengths, 1e-12)


def _spread(average_precision: np.ndarray) -> np.ndarray:
    """Return rows of a few queries, evenly from the best average precision to the worst."""
    valid = np.flatnonzero(~np.isnan(average_precision))
    order = valid[np.argsort(-average_precision[valid], kind="stable")]
    return order[np.linspace(0, len(order) - 1, min(QUERIES, len(order))).astype(int)]
