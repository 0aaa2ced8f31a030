"""Weight decay rules in a training loop without Lightning: handwritten digits, a small network, a few seconds.

    python examples/plain_pytorch.py

One line puts the rules in force in the optimizer, whose param groups stay as they are. λ of the matrices rises along
half a cosine. Half way the training is saved and goes on in a new model and optimizer, as after a break. Leaves nothing
behind.
"""

from __future__ import annotations

import io

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_regdecay import GroupL2Norm, apply_decay_rules, groups_in_force

EPOCHS, BATCH = 20, 64
RULES = {
    "*.bias": 0.0,
    "norm": {"params": "1.*", "weight_decay": 0.0},
    "*": {"schedule": "cosine", "start": 0.01, "end": 0.3},
}


def build(steps: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    apply_decay_rules(optimizer, model, RULES, total_steps=steps)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def main() -> None:
    torch.manual_seed(0)
    pixels, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(classes)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    steps = EPOCHS * (len(train) // BATCH)
    model, optimizer, scheduler = build(steps)

    for epoch in range(EPOCHS):
        if epoch == EPOCHS // 2:  # go on from what a file would hold
            file = io.BytesIO()
            torch.save([part.state_dict() for part in (model, optimizer, scheduler)], file)
            file.seek(0)
            model, optimizer, scheduler = build(steps)
            for part, state in zip((model, optimizer, scheduler), torch.load(file)):
                part.load_state_dict(state)
        for batch in train[torch.randperm(len(train))].split(BATCH)[: len(train) // BATCH]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            scheduler.step()

    print(groups_in_force(optimizer))
    metric = GroupL2Norm(group["name"] for group in groups_in_force(optimizer))
    metric.update({group["name"]: group["params"] for group in groups_in_force(optimizer)})
    print("\nL2 norms:", ", ".join(f"{name} {norm.item():.3f}" for name, norm in metric.compute().items()))
    print(f"param groups of the optimizer: {len(optimizer.param_groups)}")
    print(f"test accuracy: {accuracy(model, x[test], y[test]):.3f}")


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(dim=-1) == y).float().mean().item()


if __name__ == "__main__":
    main()
