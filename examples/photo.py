"""Learn a photograph from 5 % of its pixels, with a weight decay of its own for each part of the network.

    python examples/photo.py
    python examples/photo.py --decay-rules '{"*.bias": 0, "high.*": 30, "*": 0.1}'

The network sees a position through waves of low, middle and high frequency, each band through weights of its own, and
gives a colour. Each band alone can fit so few pixels, so it overfits. It is trained with AdamW's own weight decay, with
one λ for all weights and with a λ per group, and scored by its peak signal-to-noise ratio (PSNR) on 90 % of the pixels.
The photograph is scikit-learn's `flower.jpg`. No λ was chosen by it: `tune.py` found them on `china.jpg`.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image import PeakSignalNoiseRatio

from lightning_regdecay import WeightDecayMixin, WeightDecayMonitor, groups_in_force

GROUPS = ("low", "mid", "high", "head")
SEEDS = (2, 3, 4)  # other ones than those of the search
RULES = {  # each λ is that of the best of 30 trials on china.jpg, as the table in tuning.md has it
    "AdamW's own": {},
    "one λ for all": {"*.bias": 0.0, "*": 6.46},
    "a λ per group": {"*.bias": 0.0, "low.*": 0.0151, "mid.*": 81.3, "high.*": 87.4, "head.*": 0.208},
}
FOLDERS = {"AdamW's own": "adamw", "one λ for all": "uniform", "a λ per group": "per-group", "your rules": "yours"}
HEIGHT, WIDTH = 106, 160
TRAIN, VAL, TEST = torch.randperm(HEIGHT * WIDTH, generator=torch.Generator().manual_seed(0)).split([848, 848, 15264])


class Waves(nn.Linear):
    """A linear layer over sines and cosines of random frequencies (https://arxiv.org/abs/2006.10739)."""

    def __init__(self, frequency: float, count: int, out_features: int) -> None:
        super().__init__(2 * count, out_features)
        self.register_buffer("frequencies", frequency * torch.randn(2, count))

    def forward(self, positions: Tensor) -> Tensor:
        phases = 2 * math.pi * positions @ self.frequencies
        return super().forward(torch.cat([phases.sin(), phases.cos()], dim=-1))


class LitPhoto(WeightDecayMixin, L.LightningModule):
    """Colour as a function of position; the rules are a hyperparameter like any other."""

    def __init__(self, lr: float = 3e-3, width: int = 128, waves: int = 64, decay_rules: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.low, self.mid, self.high = (Waves(frequency, waves, width) for frequency in (2, 6, 18))
        self.head = nn.Linear(width, 3)
        self.val_psnr = PeakSignalNoiseRatio(data_range=1.0)
        self.test_psnr = PeakSignalNoiseRatio(data_range=1.0)

    def forward(self, positions: Tensor) -> Tensor:
        return self.head((self.low(positions) + self.mid(positions) + self.high(positions)).relu())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.val_psnr(self(batch[0]), batch[1])
        self.log("val_psnr", self.val_psnr)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.test_psnr(self(batch[0]), batch[1])
        self.log("test_psnr", self.test_psnr)


def pixels(name: str) -> tuple[Tensor, Tensor]:
    """Position and colour of each pixel of one of scikit-learn's photographs."""
    image = torch.tensor(load_sample_image(name).copy()).permute(2, 0, 1) / 255
    rows_and_columns = torch.cartesian_prod(torch.arange(HEIGHT), torch.arange(WIDTH))
    return rows_and_columns.flip(1) / WIDTH, nn.functional.avg_pool2d(image, 4).flatten(1).T


def photo(name: str) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Loaders of 5 % of the pixels for training, 5 % for validation and 90 % for the test."""
    positions, colours = pixels(name)
    train, val, test = (TensorDataset(positions[part], colours[part]) for part in (TRAIN, VAL, TEST))
    return DataLoader(train, batch_size=128, shuffle=True), DataLoader(val, batch_size=4096), DataLoader(test, 4096)


def train(name: str, rules: Any, seed: int, epochs: int, **options: Any) -> tuple[L.Trainer, LitPhoto, DataLoader]:
    """Train once on a photograph; the test pixels are left. `trainer.callback_metrics` holds the validation score."""
    L.seed_everything(seed, verbose=False)
    train_data, val_data, test_data = photo(name)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=5,
        **options,
    )
    model = LitPhoto(decay_rules=rules)
    trainer.fit(model, train_data, val_data)
    return trainer, model, test_data


def lambdas(trainer: L.Trainer) -> str:
    """The λ that the optimizer holds for the weights of each group, as cells of a table."""
    held = {n: group["weight_decay"] for group in groups_in_force(trainer.optimizers[0]) for n in group["param_names"]}
    return "".join(f"{held[f'{group}.weight']:>9.3g}" for group in GROUPS)


def draw(learnt: dict[str, Tensor], monitor: WeightDecayMonitor, title: str, path: str) -> None:
    """The given pixels, what was learnt of them and the truth; below, norms and penalties over a training."""
    _, truth = pixels("flower.jpg")
    given = torch.ones_like(truth).index_copy(0, TRAIN, truth[TRAIN])
    images = {"given: 5 % of the pixels": given, **learnt, "the truth": truth}
    figure = plt.figure(figsize=(9, 5.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.75, 3.65])
    for ax, (what, image) in zip(top.subplots(1, len(images)), images.items()):
        ax.imshow(image.view(HEIGHT, WIDTH, 3))
        ax.set_title(what, fontsize=10)
        ax.set_axis_off()
    _, (norms, penalties) = monitor.plot(ax=bottom.subplots(1, 2))
    norms.set(xlabel=penalties.get_xlabel(), yscale="log")
    norms.autoscale(axis="y")
    norms.yaxis.set(major_locator=plt.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    bottom.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def rules_from(text: str) -> dict[str, Any]:
    """One more row of the table, from JSON or YAML, given as text or as the path of a file."""
    path = Path(text)
    return {"your rules": yaml.safe_load(path.read_text() if path.suffix in (".json", ".yaml", ".yml") else text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decay-rules", type=rules_from, default={}, help="yours: JSON or YAML, as text or a file")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--picture", default="decay.png", help="where to save the plot")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # on matrices this small, threads mostly wait for each other

    learnt = {}
    print(f"{'weight decay':<16}{''.join(f'{group:>9}' for group in GROUPS)}{'test pixels, dB':>20}")
    for name, rules in {**RULES, **args.decay_rules}.items():
        scores = []
        for seed in SEEDS:
            monitor = WeightDecayMonitor(summary=False)
            loggers = [TensorBoardLogger("logs", FOLDERS[name]), CSVLogger("logs", f"{FOLDERS[name]}-csv")]
            trainer, model, data = train("flower.jpg", rules, seed, args.epochs, callbacks=[monitor], logger=loggers)
            scores += [trainer.test(model, data, verbose=False)[0]["test_psnr"]]
        print(f"{name:<16}{lambdas(trainer)}{statistics.mean(scores):>13.2f} ± {statistics.stdev(scores):.2f}")
        if name != "AdamW's own":
            learnt[f"{name}: {scores[-1]:.1f} dB"] = model(pixels("flower.jpg")[0]).detach().clamp(0, 1)

    draw(learnt, monitor, f"the groups over the last training, with {name}", args.picture)
    print(f"\nsaved {args.picture}; logs are in logs/, as CSV and for `tensorboard --logdir logs`")


if __name__ == "__main__":
    main()
