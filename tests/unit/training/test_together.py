"""What workers do together beside the step: gather embeddings, wait for the ranking, find drift."""

from __future__ import annotations

import time
from contextlib import closing, nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import run_workers
from tiny import config, make_worker, narrow_resnet18
from torchvision.models import resnet

from data_shards.dataset import Dataset
from data_shards.errors import ReidError
from data_shards.progress import silent
from reid_train.evaluation.extract import gather_rows
from reid_train.model.collectives import require_equal
from reid_train.model.pretrained import build_model
from reid_train.training import validation
from reid_train.training.context import WorkerContext
from reid_train.training.data import make_decoders

WORLD = 2
PATIENCE = 2.0  # seconds after which an exchange times out
SLOW = 5.0  # seconds of the ranking


def _drift(rank: int, worker: WorkerContext) -> str:
    """What a worker says of weights that differ by one rounding of one number."""
    model = build_model(config(), 6)
    assert worker.host_group is not None
    require_equal(model.state_dict(), worker.host_group)
    if rank == 1:
        with torch.no_grad():
            bias = model.regional_heads[1].norm.bias
            bias[3] = torch.nextafter(bias[3], torch.tensor(1.0))
    try:
        require_equal(model.state_dict(), worker.host_group)
    except ReidError as error:
        return str(error)
    return ""


def _gathered(rank: int, worker: WorkerContext) -> list[torch.Tensor]:
    """Rows of both ranks, for splits of which rank 0 has fewer, or none."""
    found = []
    for total in (7, 1):
        own = range(total * rank // WORLD, total * (rank + 1) // WORLD)
        rows = torch.zeros(total if rank == 0 else len(own), 3)
        for place, number in enumerate(own):
            rows[place] = number
        gather_rows(rows, total, worker.host_group)
        found.append(rows)
    return found


def _reports(total: int, worker: WorkerContext) -> list[tuple[str, int, int]]:
    """What is reported while the ranks embed a split."""
    reports: list[tuple[str, int, int]] = []
    worker.progress = lambda *report: reports.append(report)
    own = len(range(total * worker.rank // WORLD, total * (worker.rank + 1) // WORLD))
    batches = [SimpleNamespace(row=range(own))]
    list(validation._counted(batches, "embedding", total, worker))  # type: ignore[arg-type]
    worker.progress = silent
    return reports


def _slow_ranking(dataset: Dataset, worker: WorkerContext) -> dict[str, float]:
    """Metrics of an evaluation with a slow ranking, and then an exchange that may not take long."""
    settings, rank_gallery = config(loader__workers=0), validation.rank_gallery

    def slow(*arguments, **options):
        time.sleep(SLOW)
        return rank_gallery(*arguments, **options)

    model, short = build_model(settings, 6), dist.new_group(timeout=timedelta(seconds=PATIENCE))
    with (
        pytest.MonkeyPatch.context() as patch,
        closing(make_decoders(settings, dataset, worker)) as decoders,
    ):
        patch.setattr(validation, "rank_gallery", slow)
        place = dataset, worker, decoders
        found = validation.validate(settings, *place, model, nullcontext)
    dist.all_reduce(torch.zeros(1), group=short)
    return found.metrics


def _worker(rank: int, url: str, scratch: str) -> dict[str, object]:
    resnet.resnet18 = narrow_resnet18
    dataset = Dataset.open(url)
    worker, _ = make_worker(dataset, Path(scratch), rank, WORLD)
    return {
        "drift": _drift(rank, worker),
        "gathered": _gathered(rank, worker),
        "reports": _reports(21, worker),
        "metrics": _slow_ranking(dataset, worker),
    }


@pytest.fixture(scope="module")
def workers(tiny_dataset, tmp_path_factory) -> list[dict]:
    return run_workers(_worker, WORLD, tiny_dataset.url, str(tmp_path_factory.mktemp("together")))


def test_drift_is_an_error_that_names_ranks_and_tensor(workers):
    for worker in workers:
        assert worker["drift"].startswith("the weights of rank 1 are not those of rank 0: regional")
        assert "regional_heads.1.norm.bias differs, and 0 more of " in worker["drift"]


def test_rows_of_all_ranks_are_gathered_in_order(workers):
    for rows in workers[0]["gathered"]:
        assert rows[:, 0].tolist() == list(range(len(rows)))


def test_the_last_report_of_a_stage_is_its_total_although_rank_0_has_fewer_images(workers):
    assert workers[0]["reports"][0] == ("embedding", 0, 21)
    assert workers[0]["reports"][-1] == ("embedding", 21, 21)
    assert workers[1]["reports"] == []


def test_others_wait_for_a_ranking_longer_than_an_exchange_may_take(workers):
    assert workers[0]["metrics"].keys() >= {"mAP", "rank-1"}
    assert workers[1]["metrics"] == {}
