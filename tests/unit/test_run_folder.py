"""What is left in a run's folder when the run has ended."""

from __future__ import annotations

from reid_train.config import TrainConfig
from reid_train.run_folder import tidy


def test_copy_that_was_killed_goes_with_its_folder(tmp_path):
    """Its temporary file is none of the storage's objects, and may be all that there is."""
    run = tmp_path / "r"
    for name in (
        "checkpoint_1/model.safetensors",
        "checkpoint_2/model.safetensors",
        "checkpoint_2/.tmp-half",
        "checkpoint_3/.tmp-half",
        "checkpoint_manager_snapshot.json",
        "report/index.html",
        "run.json",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"x")
    tidy(TrainConfig().replace(name="r", output=str(tmp_path)), {"checkpoint_1"})
    assert {path.name for path in run.iterdir()} == {
        "checkpoint_1",
        "checkpoint_manager_snapshot.json",
        "report",
        "run.json",
    }
    assert list((run / "checkpoint_1").iterdir())
