"""Adaptive L2 regularization in Hugging Face's Trainer."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from reid_train.regularization import AdaptiveL2


class Classifier(nn.Sequential):
    """Returns its loss, as the Trainer wants it; any model of transformers does."""

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = super().forward(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return Classifier(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def make_data(count: int = 64) -> list[dict[str, Any]]:
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    return [{"inputs": row, "labels": int(row[:3].argmax())} for row in inputs]


class RegularizedTrainer(Trainer):
    def __init__(self, *args: Any, amplitude: float = 0.005, **options: Any) -> None:
        super().__init__(*args, **options)
        self.regularizer = AdaptiveL2(self.model, amplitude)

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        groups = self.regularizer.parameter_groups(self.args.learning_rate)
        self.optimizer = torch.optim.Adam(groups, eps=1e-7)
        return self.optimizer

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(*args, **options)
        if self.accelerator.sync_gradients:  # after the last micro-batch of a step
            self.regularizer.add_gradients()
        return loss

    def save_model(self, output_dir: str | None = None, **options: Any) -> None:
        super().save_model(output_dir, **options)
        if self.args.should_save:
            theta = json.dumps(self.regularizer.theta_by_name())
            Path(output_dir or self.args.output_dir, "theta.json").write_text(theta)


def make_trainer(folder: str, epochs: int, batch: int = 64, **options: Any) -> RegularizedTrainer:
    settings = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": []}
    arguments = TrainingArguments(
        output_dir=folder,
        learning_rate=1e-2,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        **settings | options,
    )
    return RegularizedTrainer(make_model(), arguments, train_dataset=make_data())


if __name__ == "__main__":
    trainer = make_trainer("runs/trainer", epochs=4)
    trainer.train()
    for name, factor in trainer.regularizer.factors().items():
        print(f"{name}: λ = {factor:.6f}")
