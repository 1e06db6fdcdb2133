"""What a group of workers is given."""

from __future__ import annotations

import pytest
import ray

from reid_train.runs.ray_trainer import use_gpu


@pytest.mark.parametrize(
    ("device", "here", "needed", "expected"),
    [
        ("auto", 2, 2, True),
        ("auto", 1, 2, False),
        ("auto", 0, 1, False),
        ("cpu", 8, 1, False),
        ("cuda", 0, 1, True),
    ],
)
def test_gpus_are_taken_if_there_are_enough_or_they_are_asked_for(
    device, here, needed, expected, monkeypatch
):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": float(here)})
    assert use_gpu(device, needed) is expected


def test_gpus_that_are_too_few_are_not_left_idle_without_a_word(monkeypatch, caplog):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    assert not use_gpu("auto", 4)
    assert "2 GPUs are here, fewer than the 4 workers" in caplog.text


def test_where_only_free_gpus_count_those_of_others_do_not(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"GPU": 1.0})
    assert use_gpu("auto", 2)
    assert not use_gpu("auto", 2, free=True)
