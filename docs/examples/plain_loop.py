"""Adaptive L2 regularization in a plain PyTorch loop."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from reid_train.regularization import AdaptiveL2


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def make_data(count: int = 64) -> TensorDataset:
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def train(epochs: int = 4, batch: int = 64) -> tuple[nn.Module, AdaptiveL2]:
    model = make_model()
    regularizer = AdaptiveL2(model, amplitude=0.005)
    optimizer = torch.optim.Adam(regularizer.parameter_groups(lr=1e-2), eps=1e-7)
    for _ in range(epochs):
        for inputs, labels in DataLoader(make_data(), batch):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            regularizer.add_gradients()
            optimizer.step()
    return model, regularizer


if __name__ == "__main__":
    _, regularizer = train()
    for name, factor in regularizer.factors().items():
        print(f"{name}: λ = {factor:.6f}")
