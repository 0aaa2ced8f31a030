"""What a strength inside of a tensor, toward a start, and bound to the lr is good for: measured on real data.

    python examples/strengths.py
    python examples/strengths.py finetune columns

Each comparison sets a strength beside what it takes the place of. Every alternative has its λ chosen from the same grid
by the same validation data, and is scored on other data, over three seeds. Not each of them is better for it:

- finetune: digits turned by 45 degrees are learned from 30 examples, after upright ones. Toward the start, more of the
  upright ones is kept, an accuracy of 0.53 against 0.41, for 0.02 less on the turned ones.
- tasks: one network learns labels at random, again and again. Toward the start it goes on learning, toward 0 not.
- columns: a photograph from 5 % of its pixels, waves of three bands in one tensor. A λ for each band gives 0.9 dB more.
- rows: rare words have a λ of their own in the table of a text classifier. It made no difference.
- lr: a λ found at one lr, at a tenth to ten times of it. Upward, λ itself fails and what holds lr·λ (`timescale`,
  `per_step`) does not; downward it is the other way around.

All of them take about four minutes on two cores, and leave nothing behind. The guides have the tables: parts.md,
starts.md, tuning.md.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import re
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import scipy.ndimage
import torch
from photo import TEST, TRAIN, VAL, pixels
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_regdecay import apply_decay_rules

SEEDS = (0, 1, 2)
NONE: dict[str, Any] = {"": {"*": 0.0}}
Rules = Mapping[str, Any]


class Scores(NamedTuple):
    """What λ is chosen by, and what is shown, under the same names; more is better."""

    val: Mapping[str, float]
    test: Mapping[str, float]


def train(
    model: nn.Module,
    rules: Rules,
    data: tuple[Tensor, Tensor],
    *,
    steps: int,
    batch: int,
    lr: float,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> None:
    """Train for some steps of batches drawn at random, with an lr that falls to 0 along a line."""
    stepper = optimizer(model.parameters(), lr=lr)
    apply_decay_rules(stepper, model, rules, total_steps=steps)
    scheduler = torch.optim.lr_scheduler.LinearLR(stepper, 1.0, 0.01, steps)
    for _ in range(steps):
        chosen = torch.randint(len(data[1]), (batch,))
        stepper.zero_grad()
        loss(model(data[0][chosen]), data[1][chosen]).backward()
        stepper.step()
        scheduler.step()


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, classes: Tensor) -> float:
    return (model(inputs).argmax(dim=1) == classes).float().mean().item()


def runs(grid: Mapping[str, Rules], run: Callable[[Rules, int], Scores]) -> dict[str, list[Scores]]:
    """What each of some rules comes to, for each seed."""
    return {label: [run(rules, seed) for seed in SEEDS] for label, rules in grid.items()}


def best(found: Mapping[str, list[Scores]], by: Iterable[str] | None = None) -> str:
    """The rules with the best mean of validation scores, or of some of these, over the seeds."""
    names = None if by is None else [*by]

    def score(every: list[Scores]) -> float:
        return statistics.mean(one.val[name] for one in every for name in names or one.val)

    return max(found, key=lambda label: score(found[label]))


def show(name: str, label: str, every: list[Scores]) -> None:
    cells = []
    for what in every[0].test:
        values = [scores.test[what] for scores in every]
        cells.append(f"{what} {statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
    print(f"  {name:<22} {label:<20} {'   '.join(cells)}", flush=True)


def perceptron(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def digits() -> tuple[Tensor, Tensor]:
    images, classes = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(classes)


def decays(grid: Iterable[float]) -> dict[str, dict[str, Rules]]:
    """Three alternatives with each λ of a grid."""
    grid = [*grid]
    return {
        "none": NONE,
        "toward 0": {f"λ = {λ}": {"*": λ} for λ in grid},
        "toward the start": {f"λ = {λ}": {"*": {"weight_decay": λ, "toward": "start"}} for λ in grid},
    }


def finetune(shorter: int) -> None:
    """800 digits upright, then 30 turned by 45 degrees; λ by 300 other digits, the test are the 667 that are left."""
    images, classes = digits()
    turned = scipy.ndimage.rotate(images.numpy().reshape(-1, 8, 8), 45, axes=(1, 2), reshape=False, order=1)
    kinds = {"turned": torch.tensor(turned).flatten(1), "upright": images}
    pretrained = {}
    for seed in SEEDS:
        torch.manual_seed(seed)
        parts = torch.randperm(len(images)).split([800, 30, 300, 667])
        model = perceptron(64, 128, 128, 10)
        upright = images[parts[0]], classes[parts[0]]
        train(model, {"*.bias": 0.0, "*": 0.01}, upright, steps=400 // shorter, batch=32, lr=3e-3)
        pretrained[seed] = parts, model.state_dict()

    def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)

    def run(rules: Rules, seed: int) -> Scores:
        (_, few, val, test), weights = pretrained[seed]
        model = perceptron(64, 128, 128, 10)
        model.load_state_dict(weights)
        torch.manual_seed(seed)
        data = kinds["turned"][few], classes[few]
        train(model, rules, data, steps=200 // shorter, batch=32, lr=3e-2, optimizer=sgd)
        ours, theirs = (
            {kind: accuracy(model, some[part], classes[part]) for kind, some in kinds.items()} for part in (val, test)
        )
        return Scores(ours, theirs)

    found = {name: runs(grid, run) for name, grid in decays((0.003, 0.01, 0.03, 0.1, 0.3)).items()}
    for by in (("turned", "upright"), ("turned",)):
        print(f"  λ by the accuracy on {' and '.join(by)} digits:")
        for name, every in found.items():
            label = best(every, by)
            show(name, label, every[label])


def tasks(shorter: int) -> None:
    """20 tasks in a row, each with new labels at random for 300 digits; accuracies are those while a task is learned.

    λ is chosen on another row.
    """
    images, _ = digits()
    steps = 150 // shorter

    def row(rules: Rules, seed: int) -> Scores:
        torch.manual_seed(seed)
        model, some = perceptron(64, 64, 64, 10), images[torch.randperm(len(images))[:300]]
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
        apply_decay_rules(optimizer, model, rules)
        found = []
        for _ in range(20):
            labels, hits = torch.randint(10, (300,)), 0.0
            for _ in range(steps):
                chosen = torch.randint(300, (30,))
                guessed = model(some[chosen])
                hits += (guessed.argmax(dim=1) == labels[chosen]).float().mean().item()
                optimizer.zero_grad()
                nn.functional.cross_entropy(guessed, labels[chosen]).backward()
                optimizer.step()
            found.append(hits / steps)
        ends = {"first 3 tasks": statistics.mean(found[:3]), "last 3 tasks": statistics.mean(found[-3:])}
        return Scores({"all": statistics.mean(found)}, ends)

    for name, grid in decays((0.03, 0.1, 0.3, 1.0)).items():
        label = best({label: [row(rules, seed=100)] for label, rules in grid.items()})
        show(name, label, [row(grid[label], seed) for seed in SEEDS])


class Photo(nn.Module):
    """Colour from a position: waves of three bands, side by side, into one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.waves = torch.cat([frequency * torch.randn(2, 64) for frequency in (2, 6, 18)], dim=1)
        self.layer, self.head = nn.Linear(384, 128), nn.Linear(128, 3)

    def forward(self, positions: Tensor) -> Tensor:
        phases = (2 * torch.pi * positions @ self.waves).view(len(positions), 3, 64)
        return self.head(self.layer(torch.cat([phases.sin(), phases.cos()], dim=2).flatten(1)).relu())


def columns(shorter: int) -> None:
    """Learned from 848 pixels; λ by 848 others, band after band; the test are the 15264 pixels that are left."""
    positions, colours = pixels("flower.jpg")

    def run(rules: Rules, seed: int) -> Scores:
        torch.manual_seed(seed)
        model = Photo()
        data, loss = (positions[TRAIN], colours[TRAIN]), nn.functional.mse_loss
        train(model, rules, data, steps=200 // shorter, batch=128, lr=3e-3, loss=loss)
        with torch.no_grad():
            val, test = (loss(model(positions[part]), colours[part]).log10().item() for part in (VAL, TEST))
        return Scores({"dB": -10 * val}, {"dB": -10 * test})

    def bands(strengths: Mapping[str, float]) -> Rules:
        layer = {"params": "layer.weight", "dim": 1, "blocks": ["low", "mid", "high"]}
        return {"*.bias": 0.0, "layer": {**layer, "weight_decay": strengths}, "*": 0.1}

    grid = (0.1, 1.0, 10.0, 30.0, 100.0)
    found = runs({f"{λ:g}": {"*.bias": 0.0, "layer.*": λ, "*": 0.1} for λ in grid}, run)
    label = best(found)
    show("one for the tensor", f"λ = {label}", found[label])
    strengths = dict.fromkeys(("low", "mid", "high"), float(label))
    for band in ("high", "mid", "low"):
        found = runs({f"{λ:g}": bands({**strengths, band: λ}) for λ in grid}, run)
        label = best(found)
        strengths[band] = float(label)
    show("one for each band", "λ = " + ", ".join(f"{λ:g}" for λ in strengths.values()), found[label])


PACKAGES = ["asyncio", "ctypes", "email", "html", "http", "importlib"]
PACKAGES += ["json", "logging", "multiprocessing", "tkinter", "unittest", "urllib"]


def texts() -> list[tuple[list[str], int]]:
    """The words of pieces of six lines of the standard library's sources, and which of 12 packages they are from."""
    found = []
    for number, name in enumerate(PACKAGES):
        files = sorted((Path(sysconfig.get_path("stdlib")) / name).glob("*.py"))
        lines = [line for file in files for line in file.read_text(errors="ignore").splitlines() if line.strip()]
        pieces = [re.findall("[a-z]{2,}", " ".join(lines[n : n + 6]).lower()) for n in range(0, len(lines), 6)]
        found += [(words, number) for words in pieces if len(words) > 7][:160]
    return found


class Words(nn.Module):
    """A classifier of bags of words."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(words, 64, mode="mean", padding_idx=0)
        nn.init.normal_(self.table.weight, std=0.3)
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, len(PACKAGES))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.table(words)).relu())


def rows(shorter: int) -> None:
    """Learned from half of the texts; a quarter chooses λ, a quarter is the test. Rare is what one text or two have."""
    every = texts()
    classes = torch.tensor([number for _, number in every])
    given = {}
    for seed in SEEDS:
        parts = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tensor_split(4)
        learned = torch.cat(parts[:2])
        counts = collections.Counter(word for n in learned.tolist() for word in sorted({*every[n][0]}))
        known = {word: n for n, (word, _) in enumerate(counts.most_common(), 1)}
        bags = [torch.tensor([known.get(word, 0) for word in words][:60]) for words, _ in every]
        frequent = 1 + sum(count > 2 for count in counts.values())
        given[seed] = learned, *parts[2:], nn.utils.rnn.pad_sequence(bags, batch_first=True), frequent, 1 + len(known)

    def run(strengths: Rules, seed: int) -> Scores:
        learned, val, test, bags, frequent, words = given[seed]
        torch.manual_seed(seed)
        model = Words(words)
        rare = {"params": "table.weight", "rows": f"{frequent}:", "weight_decay": strengths["rare"]}
        rules = {"*.bias": 0.0, "rare": rare, "table.*": strengths["others"], "*": 0.01}
        train(model, rules, (bags[learned], classes[learned]), steps=240 // shorter, batch=50, lr=1e-2)
        return Scores(*({"accuracy": accuracy(model, bags[part], classes[part])} for part in (val, test)))

    grid = (0.0, 0.3, 1.0, 3.0)
    alternatives = {
        "none": {"": {"rare": 0.0, "others": 0.0}},
        "one for the table": {f"λ = {λ}": {"rare": λ, "others": λ} for λ in grid},
        "another for the rare": {f"λ = {λ}, {rare}": {"rare": rare, "others": λ} for λ in grid[1:] for rare in grid},
    }
    for name, strengths in alternatives.items():
        found = runs(strengths, run)
        label = best(found)
        show(name, label, found[label])


def lr(shorter: int) -> None:
    """500 digits, 30 % of them with a label at random; λ at lr 0.003 by 300 others, the test are the 997 left."""
    images, classes = digits()
    at = 3e-3

    def run(rules: Rules, seed: int, lr: float = at) -> Scores:
        torch.manual_seed(seed)
        learned, val, test = torch.randperm(len(images)).split([500, 300, 997])
        labels = torch.where(torch.rand(500) < 0.3, torch.randint(10, (500,)), classes[learned])
        layers = [[nn.Linear(n, 128, bias=False), nn.LayerNorm(128), nn.ReLU()] for n in (64, 128)]
        model = nn.Sequential(*layers[0], *layers[1], nn.Linear(128, 10))
        every = {"norms": {"modules": "LayerNorm", "weight_decay": 0.0}, "*.bias": 0.0, **rules}
        train(model, every, (images[learned], labels), steps=400 // shorter, batch=50, lr=lr)
        return Scores(*({f"{lr:g}:": accuracy(model, images[part], classes[part])} for part in (val, test)))

    grid = (0.01, 0.03, 0.1, 0.3)
    alternatives = {
        "none": NONE,
        "constant": {f"λ = {rate / at:.3g}": {"*": rate / at} for rate in grid},
        "timescale": {
            f"T = {1 / rate:.0f}": {"*": {"schedule": "timescale", "steps": round(1 / rate)}} for rate in grid
        },
        "per_step": {f"lr·λ = {rate}": {"*": {"schedule": "per_step", "start": rate}} for rate in grid},
    }
    for name, rules in alternatives.items():
        label = best(runs(rules, run))
        every = [
            {
                key: score
                for factor in (0.1, 0.3, 1, 3, 10)
                for key, score in run(rules[label], seed, at * factor).test.items()
            }
            for seed in SEEDS
        ]
        show(name, label, [Scores({}, test) for test in every])


COMPARISONS = {function.__name__: function for function in (finetune, tasks, columns, rows, lr)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="*", help=f"which of {', '.join(COMPARISONS)}; all by default")
    parser.add_argument("--shorter", type=int, default=1, help="so many times fewer steps, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # on matrices this small, threads mostly wait for each other
    for name in args.comparisons or COMPARISONS:
        began = time.perf_counter()
        print(name)
        COMPARISONS[name](args.shorter)
        print(f"  ({time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
