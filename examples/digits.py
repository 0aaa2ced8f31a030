"""Train a small convolutional network on handwritten digits, with a weight decay of its own for each part.

    python examples/digits.py
    python examples/digits.py --decay-rules '{"*.bias": 0, "*norm*": 0, "*": 0.1}'
    python examples/digits.py --decay-rules rules.yaml

The data are scikit-learn's 1797 handwritten digits of 8x8 pixels. The norms of the groups and the test accuracy are
printed. Logs for TensorBoard and as CSV go to `logs/`, the norms and penalties of the groups over time to `decay.png`.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_regdecay import WeightDecayMixin, WeightDecayMonitor

RULES = {
    "*.bias": 0.0,
    "*norm*": 0.0,
    "head.*": 1e-2,
    "*": 0.3,
}


class LitDigits(WeightDecayMixin, L.LightningModule):
    """A convolutional network with norms and a head; the rules are a hyperparameter like any other."""

    def __init__(self, lr: float = 3e-3, width: int = 32, decay_rules: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Conv2d(1, width, kernel_size=3, padding=1)
        self.stem_norm = nn.GroupNorm(4, width)
        self.body = nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1)
        self.body_norm = nn.GroupNorm(4, 2 * width)
        self.head = nn.Linear(2 * width * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem_norm(self.stem(images)).relu()
        hidden = self.body_norm(self.body(hidden)).relu()
        return self.head(hidden.flatten(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", self._accuracy(batch), batch_size=len(batch[0]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_accuracy", self._accuracy(batch), batch_size=len(batch[0]))

    def _accuracy(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return (self(images).argmax(dim=1) == labels).float().mean()


def digits() -> tuple[DataLoader, DataLoader, DataLoader]:
    """Loaders of 60 % of the digits for training, 20 % for validation and 20 % for the test."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 - 0.5
    labels = torch.tensor(labels)
    train, rest = train_test_split(range(len(labels)), test_size=0.4, random_state=0, stratify=labels)
    val, test = train_test_split(rest, test_size=0.5, random_state=0, stratify=labels[rest])
    parts = [TensorDataset(images[part], labels[part]) for part in (train, val, test)]
    return tuple(DataLoader(part, batch_size=64, shuffle=part is parts[0]) for part in parts)


def train(rules: Any, epochs: int) -> tuple[float, WeightDecayMonitor]:
    """Train once and return the test accuracy with the monitor that watched."""
    L.seed_everything(0, verbose=False)
    train_data, val_data, test_data = digits()
    monitor = WeightDecayMonitor()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=[TensorBoardLogger("logs", name="digits"), CSVLogger("logs", name="digits-csv")],
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    model = LitDigits(decay_rules=rules)
    trainer.fit(model, train_data, val_data)
    [result] = trainer.test(model, test_data, verbose=False)
    return result["test_accuracy"], monitor


def first_and_last_norms(monitor: WeightDecayMonitor) -> str:
    """A table of each group's L2 norm after the first and after the last epoch."""
    rows = [row for row in monitor.records() if row["group"] != "total"]
    first = {row["group"]: row for row in reversed(rows)}
    last = {row["group"]: row for row in rows}
    lines = [f"{'group':<12}{'weight decay':>14}{'first norm':>14}{'last norm':>14}"]
    for group, row in last.items():
        norms = f"{first[group]['l2_norm']:>14.4f}{row['l2_norm']:>14.4f}"
        lines.append(f"{group:<12}{row['weight_decay']:>14g}{norms}")
    return "\n".join(lines)


def rules_from(text: str) -> Any:
    """Rules from JSON or YAML, given as text or as the path of a file."""
    path = Path(text)
    return yaml.safe_load(path.read_text() if path.suffix in (".json", ".yaml", ".yml") else text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decay-rules", type=rules_from, default=RULES, help="JSON or YAML, as text or a file")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--picture", default="decay.png", help="where to save the plot")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    accuracy, monitor = train(args.decay_rules, args.epochs)
    figure, _ = monitor.plot()
    figure.savefig(args.picture, dpi=150)
    print(f"\n{first_and_last_norms(monitor)}\n")
    print(f"test accuracy: {accuracy:.4f}")
    print(f"saved {args.picture}; logs are in logs/, as CSV and for `tensorboard --logdir logs`")


if __name__ == "__main__":
    main()
