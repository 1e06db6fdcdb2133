"""Adaptive L2 regularization in a LightningModule."""

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from reid_train.regularization import AdaptiveL2


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def make_data(count: int = 64) -> TensorDataset:
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


class Regularized(pl.LightningModule):
    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr
        # Not a submodule, so that DDP does not wait for θ's gradient.
        object.__setattr__(self, "regularizer", AdaptiveL2(model, amplitude=0.005))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.model(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.regularizer.parameter_groups(self.lr), eps=1e-7)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.regularizer.add_gradients()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["theta"] = self.regularizer.theta_by_name()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.regularizer.load_theta(checkpoint["theta"])


def train(epochs: int = 4, batch: int = 64, **options) -> tuple[nn.Module, AdaptiveL2]:
    module = Regularized(make_model(), lr=1e-2)
    trainer = pl.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, **options)
    trainer.fit(module, DataLoader(make_data(), batch))
    return module.model, module.regularizer


if __name__ == "__main__":
    _, regularizer = train()
    for name, factor in regularizer.factors().items():
        print(f"{name}: λ = {factor:.6f}")
