"""What is compiled: how many graphs, the same results as eager, and when."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from tiny import config, run
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.parallel import DistributedDataParallel

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from reid_train.model import batch_norm
from reid_train.model.pretrained import build_model
from reid_train.regularization import AdaptiveL2, ConstantL2
from reid_train.training.compiled import compiles, find_compiler, make_finish

pytestmark = pytest.mark.usefixtures("small_and_quick")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COMPILE = torch.compile


@pytest.fixture
def graphs(monkeypatch) -> Iterator[list[str]]:
    """Compile without generating code, and note each graph of a forward and a backward pass."""
    found: list[str] = []

    def noted(kind: str, graph, inputs):
        found.append(kind)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=partial(noted, "forward"), bw_compiler=partial(noted, "backward")
    )

    def compile(function, *, options=None, **given):
        return COMPILE(function, backend=backend, **given)

    monkeypatch.setattr(torch, "compile", compile)
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


@pytest.fixture
def group(tmp_path: Path, monkeypatch) -> Iterator[None]:
    """A process group of one, in which batch norm exchanges as with more."""
    monkeypatch.setattr(batch_norm, "world_size", lambda: 2)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _step(network: nn.Module) -> None:
    output = network(torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last))
    torch.stack([part.sum() for part in (*output.pooled, *output.logits)]).sum().backward()


@pytest.mark.parametrize("norm", ["local", "global"])
def test_network_is_one_graph_and_in_ddp_one_for_each_bucket(graphs, group, norm):
    model = build_model(config(model__batch_norm=norm), 6).to(memory_format=torch.channels_last)
    network = torch.compile(model, fullgraph=True, dynamic=False)
    _step(network)
    assert graphs == ["forward", "backward"]
    graphs.clear()
    torch.compiler.reset()
    # 1.4 MB of gradients
    _step(DistributedDataParallel(network, bucket_cap_mb=1, gradient_as_bucket_view=True))
    assert graphs == ["forward"] * 2 + ["backward"] * 2


def _finished(kind: type, clip_norm: float | None, *, compiled: bool) -> dict[str, torch.Tensor]:
    """Gradients, θ's too, norm and penalty after two steps, in which gradients are made anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 5))
    model = model.to(memory_format=torch.channels_last)
    model[3].bias.requires_grad_(False)
    regularizer = kind(model, 0.3)
    optimizer = torch.optim.SGD(regularizer.parameter_groups(1e-2))
    settings = config(optimizer__clip_norm=clip_norm)
    finish = make_finish(settings, regularizer, optimizer, compiled=compiled)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 3, 5, 5)).square().sum().backward()
        norm = finish()
        optimizer.step()
    parameters = [*model.parameters(), *regularizer.parameters()]
    gradients = {str(n): p.grad for n, p in enumerate(parameters) if p.grad is not None}
    assert len(gradients) == len(parameters) - 1
    return gradients | {"norm": norm, "penalty": regularizer.last_penalty}


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("kind", [AdaptiveL2, ConstantL2])
def test_regularizer_norm_and_clipping_are_one_graph_with_the_results_of_eager(
    graphs, kind, clip_norm
):
    expected = _finished(kind, clip_norm, compiled=False)
    found = _finished(kind, clip_norm, compiled=True)
    assert graphs == ["forward"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_generated_code_of_the_regularizer_has_the_results_of_eager():
    expected = _finished(AdaptiveL2, 0.5, compiled=False)
    torch.compiler.reset()
    found = _finished(AdaptiveL2, 0.5, compiled=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


SETTINGS = config(
    compile="on",
    batch__accumulate=2,
    optimizer__epsilon=1.0,
    optimizer__learning_rate=0.01,
    optimizer__clip_norm=1.0,
)


def test_compiled_run_has_the_losses_of_an_eager_one(graphs, tiny_dataset, tmp_path):
    eager = run(tiny_dataset, SETTINGS.replace(compile="off"), tmp_path)
    assert graphs == []
    compiled = run(tiny_dataset, SETTINGS, tmp_path)
    # In each phase network and regularizer are compiled once.
    assert sorted(graphs) == ["backward"] * 2 + ["forward"] * 4
    np.testing.assert_allclose(compiled.losses(), eager.losses(), rtol=1e-5)
    assert compiled.metrics[-1]["mAP"] == pytest.approx(eager.metrics[-1]["mAP"], abs=0.02)


@pytest.mark.parametrize(
    ("asked", "device", "deterministic", "expected"),
    [
        ("auto", "cpu", False, False),
        ("auto", "cuda", False, True),
        ("auto", "H100", False, True),
        ("auto", "cuda", True, False),
        ("on", "cpu", False, True),
        ("on", "cuda", True, True),
        ("off", "cuda", False, False),
    ],
)
def test_auto_compiles_where_it_pays(asked, device, deterministic, expected):
    assert compiles(config(compile=asked, deterministic=deterministic), device) == expected


def test_configurations_from_before_are_read():
    for old, new in ((True, "on"), (False, "off")):
        assert TrainConfig.model_validate({"compile": old}).compile == new


@pytest.mark.parametrize(("device", "compiler"), [(CPU, r"g\+\+"), (CUDA, "gcc")])
def test_missing_compiler_is_an_error_if_it_is_needed_and_else_a_warning(
    monkeypatch, caplog, device, compiler
):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{compiler}.*--compile off"):
        find_compiler(config(compile="on"), device)
    assert not find_compiler(config(compile="auto"), device)
    assert ("not compiled" in caplog.text) == (device.type == "cuda")
