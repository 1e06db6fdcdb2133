"""A folder of photos is measured as it is: its folders say who is on them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from data_shards.errors import DataError
from data_shards.storage import open_storage
from reid_train.commands.measurable import folder_embeddings, folder_labels
from reid_train.evaluation.embedding_store import EmbeddingTable, part_key, write_part
from reid_train.evaluation.ranking import rank


def test_each_photo_is_a_query_for_all_others():
    query, gallery, labels = folder_labels(["ann/1.jpg", "ann/2.jpg", "bob/1.jpg"])
    assert query.tolist() == gallery.tolist() == [0, 1, 2]
    assert labels.query_pid.tolist() == labels.gallery_pid.tolist() == [0, 0, 1]
    same_camera = labels.query_camid[:, None] == labels.gallery_camid
    assert same_camera.tolist() == np.eye(3, dtype=bool).tolist()


def test_folders_query_and_gallery_are_the_query_and_the_gallery():
    query, gallery, labels = folder_labels(
        ["gallery/ann/1.jpg", "gallery/bob/1.jpg", "query/ann/2.jpg"]
    )
    assert (query.tolist(), gallery.tolist()) == ([2], [0, 1])
    assert (labels.query_pid.tolist(), labels.gallery_pid.tolist()) == ([0], [0, 1])
    assert not set(labels.query_camid) & set(labels.gallery_camid)


@pytest.mark.parametrize("path", ["1.jpg", "ann/day/1.jpg", "query/1.jpg", "query/ann/day/1.jpg"])
def test_photo_that_does_not_say_who_is_on_it_is_named(path):
    for others in (["ann/2.jpg"], ["query/ann/2.jpg"]):
        if path.count("/") != others[0].count("/") or path == "query/1.jpg":
            with pytest.raises(DataError, match=f"{re.escape(path)} does not say whose"):
                folder_labels([path, *others])


def test_embeddings_of_a_folder_are_measured_without_each_query_itself(tmp_path):
    draw = np.random.default_rng(0)
    embedding = draw.standard_normal((12, 4)).astype(np.float32)
    pid = np.arange(12) % 4
    table = EmbeddingTable(
        embedding=embedding,
        pid=np.full(12, -1),
        camid=np.zeros(12, int),
        split=np.full(12, "gallery"),
        path=np.array([f"{p}/{n}.jpg" for n, p in enumerate(pid)], object),
    )
    write_part(open_storage(str(tmp_path)), part_key(0), table)
    result = rank(*folder_embeddings(str(tmp_path)))
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    similarity = unit @ unit.T
    precisions = []
    for q in range(12):
        order = [g for g in np.argsort(-similarity[q]) if g != q]
        hits = np.flatnonzero(pid[order] == pid[q]) + 1
        precisions.append(np.mean(np.arange(1, len(hits) + 1) / hits))
    assert result.mAP == pytest.approx(np.mean(precisions), abs=1e-9)
