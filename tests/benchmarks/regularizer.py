"""What the regularizer costs per optimizer step, beside Adam's own weight decay.

    python tests/benchmarks/regularizer.py [--backbone resnet50] [--threads 2] [--device cpu]

On the 161 tensors (25.6 million weights) of torchvision's ResNet-50, all in one run, turn by turn
so that a noisy machine treats them alike. The closed form should cost at most 1.5 × what
`weight_decay` adds to `Adam.step`. Adam's loop over tensors has each weight and gradient in the
cache when it adds the decay, its list operations have not; its fused kernel decays for nothing, and
saves more than the regularizer costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torchvision import models

from reid_train.regularization import AdaptiveL2, ConstantL2

ADAM: dict[str, dict[str, bool]] = {
    "Adam": {"foreach": False},
    "Adam foreach": {"foreach": True},
    "Adam fused": {"fused": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels-last", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    model = getattr(models, arguments.backbone)(weights=None)
    model = model.to(arguments.device, memory_format=layout)
    weights = list(model.parameters())
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    adaptive, constant = AdaptiveL2(model), ConstantL2(model, 0.0025)
    adaptive.parameter_groups(lr=0.0)  # as Adam below: no step has to move θ
    adaptive.add_gradients()  # creates θ's gradient once
    tasks: dict[str, Callable[[], object]] = {
        "AdaptiveL2.add_gradients": adaptive.add_gradients,
        "ConstantL2.add_gradients": constant.add_gradients,
        "penalty().backward()": lambda: adaptive.penalty().backward(),
    }
    for kind, options in ADAM.items():
        tasks[kind] = torch.optim.Adam(weights, lr=0.0, **options).step
        tasks[f"{kind} decay"] = torch.optim.Adam(
            weights, lr=0.0, weight_decay=5e-4, **options
        ).step
    times = measure(tasks, arguments.rounds, arguments.device)

    # Paired differences: the two steps of a round ran one after the other.
    for kind in ADAM:
        pairs = zip(times[f"{kind} decay"], times[kind], strict=True)
        times[f"weight_decay in {kind}"] = [decayed - plain for decayed, plain in pairs]
    count = sum(weight.numel() for weight in weights)
    print(f"{arguments.backbone}: {len(weights)} tensors, {count / 1e6:.1f} M weights, ", end="")
    print(f"{arguments.device}, {arguments.threads} threads, medians of {arguments.rounds} rounds")
    for name, values in times.items():
        print(f"  {name:32} {1e3 * statistics.median(values):8.2f} ms")
    ours = statistics.median(times["AdaptiveL2.add_gradients"])
    for name in ("weight_decay in Adam", "weight_decay in Adam foreach", "penalty().backward()"):
        ratio = ours / statistics.median(times[name])
        print(f"  AdaptiveL2 / {name:32} {ratio:6.2f}")


def measure(
    tasks: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Return seconds of each call, by task; the first three rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 3):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn >= 3:
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
