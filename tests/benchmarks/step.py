"""A training step on CPU cores: memory given back to the kernel, or kept.

    python tests/benchmarks/step.py [--backbone resnet18] [--size 128 64] [--rounds 3]

Each way runs in a process of its own, in turn, because memory that a process keeps stays kept. The
step is a forward and a backward pass and Adam, in a thread that is not the main one, as in Ray.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time

import torch
from torch.nn import functional as F

from reid_train.model.network import ReidNet
from reid_train.runs.process import keep_freed_memory

WARM_UP = 3


def steps(given: argparse.Namespace) -> None:
    """Print the seconds of each step, and the share of CPU time that is the kernel's, as JSON."""
    torch.set_num_threads(given.threads)
    model = ReidNet(given.backbone, 700, image=tuple(given.size), stripes=given.stripes)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(given.batch, 3, *given.size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 700, (given.batch,))
    times = []
    for step in range(WARM_UP + given.steps):
        if step == WARM_UP:
            before = resource.getrusage(resource.RUSAGE_SELF)
        began = time.perf_counter()
        optimizer.zero_grad()
        losses = [F.cross_entropy(each, labels) for each in model(images).logits]
        torch.stack(losses).sum().backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    found = {"seconds": times[WARM_UP:], "kernel": system / (user + system)}
    print(json.dumps(found | {"peak": after.ru_maxrss / 2**10}))


def main() -> None:
    """Run each way in turn, and print images a second and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backbone", default="resnet18", help="as --model.backbone")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 64), help="height and width")
    parser.add_argument("--stripes", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="of a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", help=argparse.SUPPRESS)  # this is the process that is measured
    given = parser.parse_args()
    if given.way:
        if given.way == "kept":
            keep_freed_memory()
        thread = threading.Thread(target=steps, args=[given])
        thread.start()
        thread.join()
        return
    found: dict[str, list[dict]] = {"as usual": [], "kept": []}
    for _ in range(given.rounds):
        for way in found:
            command = [sys.executable, *sys.argv, "--way", way]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            found[way].append(json.loads(output))
    speeds = {
        way: given.batch / statistics.median(s for run in runs for s in run["seconds"])
        for way, runs in found.items()
    }
    print(f"{given.backbone}, batches of {given.batch}, {given.threads} threads, medians")
    print("| memory | images/s | ratio | of CPU time in the kernel | peak |\n" + "| --- " * 5 + "|")
    for way, runs in found.items():
        kernel = 100 * statistics.median(run["kernel"] for run in runs)
        peak = max(run["peak"] for run in runs)
        ratio = speeds[way] / speeds["as usual"]
        print(f"| {way} | {speeds[way]:.1f} | {ratio:.2f} | {kernel:.1f} % | {peak:,.0f} MiB |")


if __name__ == "__main__":
    main()
