"""`python faulty.py FOLDER train …`: the main command, whose workers meet what FOLDER names.

A file in FOLDER is a fault that is due; it is renamed when it happens, so that it happens once:

    kill-forward-R-S   rank R dies in the forward pass of global step S
    kill-reduce-R-S    rank R dies in a collective of step S
    kill-upload-R-S    rank R dies half-way through the first upload after step S
    freeze-R-S         rank R stops (SIGSTOP) in step S
    gate-R-S           rank R waits in step S until a file `open-R-S` appears
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import reid_train.cli
from reid_train.runs import ray_trainer as trainer

FOLDER = Path(sys.argv[1])
train_worker = trainer._train_worker


def faulty(settings: dict) -> None:
    """What a worker runs: pickled by value, so it holds in a fresh process too."""
    import ray.train
    import torch.distributed as dist
    from torch import nn

    from data_shards.storage import open_storage
    from reid_train import transforms
    from reid_train.runs import checkpoint_store
    from reid_train.training.checkpoint import FILES

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    with (FOLDER / "worlds.txt").open("a") as file:
        file.write(f"{world}\n" if rank == 0 else "")
    step = 0
    draw, whole, reduce = transforms.draw, checkpoint_store.upload, dist.all_reduce

    def due(what: str, *, at_least: bool = False) -> str | None:
        """The fault's place among the steps, if it is due now; it is not due again."""
        for path in FOLDER.glob(f"{what}-{rank}-*"):
            place = int(path.name.split("-")[-1])
            if step == place or (at_least and step >= place):
                path.rename(FOLDER / f"done-{path.name}")
                return f"{rank}-{place}"
        return None

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def count(**options):
        nonlocal step
        step = options["step"] + 1
        if gate := due("gate"):
            while not (FOLDER / f"open-{gate}").exists():
                time.sleep(0.05)
        return draw(**options)

    def forward(*_) -> None:
        if due("kill-forward"):
            die()
        if due("freeze"):
            os.kill(os.getpid(), signal.SIGSTOP)

    def all_reduce(*arguments, **options):
        if due("kill-reduce"):
            die()
        return reduce(*arguments, **options)

    def upload(run, folder, name, **lock):
        if due("kill-upload", at_least=True):
            for file in FILES[: len(FILES) // 2]:
                open_storage(run).child(name).upload(file, folder / file)
            die()
        whole(run, folder, name, **lock)

    transforms.draw, checkpoint_store.upload, dist.all_reduce = count, upload, all_reduce
    nn.modules.module.register_module_forward_pre_hook(forward)
    train_worker(settings)


if __name__ == "__main__":
    trainer._train_worker = faulty
    sys.argv = ["reid_train", *sys.argv[2:]]
    sys.exit(reid_train.cli.main())
