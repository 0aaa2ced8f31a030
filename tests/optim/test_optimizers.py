"""Rules in force in optimizers that others built: bit for bit the training with groups by hand."""

from __future__ import annotations

import math

import pytest
import torch
from optim.by_hand import LR_RULES, OWN, RULES, AsItWas, cut, net, one_group, train, two_groups, weights

from lightning_regdecay import apply_decay_rules, groups_in_force

schedulers = torch.optim.lr_scheduler


def torchs(name, **options):
    return lambda groups: getattr(torch.optim, name)(groups, **{"lr": 0.05, "weight_decay": OWN, **options})


def others(package, name, **options):
    def build(groups):
        return getattr(pytest.importorskip(package), name)(groups, **{"lr": 0.05, "weight_decay": OWN, **options})

    return build


EVERY = ("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
FOREACH = ("ASGD", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
FUSED = ("Adagrad", "Adam", "AdamW", "SGD")
OPTIMIZERS = {
    **{name: torchs(name) for name in EVERY},
    **{f"{name} foreach": torchs(name, foreach=True) for name in FOREACH},
    **{f"{name} fused": torchs(name, fused=True) for name in FUSED},
    "SGD with momentum": torchs("SGD", momentum=0.9, nesterov=True),
    "AdamW amsgrad": torchs("AdamW", amsgrad=True),
    "AdamW with a tensor lr": lambda groups: torchs("AdamW", lr=torch.tensor(0.05), foreach=False)(groups),
    "schedule-free AdamW": others("schedulefree", "AdamWScheduleFree", warmup_steps=3),
    "schedule-free SGD": others("schedulefree", "SGDScheduleFree", warmup_steps=3),
    "Prodigy": others("prodigyopt", "Prodigy", lr=1.0),
    "Lion": others("lion_pytorch", "Lion"),
    **{
        f"pytorch-optimizer's {name}": others("pytorch_optimizer", name)
        for name in ("Adan", "AdaBelief", "DAdaptAdam", "Lamb", "Prodigy", "SOAP", "StableAdamW")
    },
}


ONE_LR = ("Prodigy", "pytorch-optimizer's Prodigy", "pytorch-optimizer's DAdaptAdam")
"""Those that refuse param groups of different lr."""


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    ("closure", "lr_rules"), [(False, None), (True, None), (False, LR_RULES)], ids=["", "closure", "lr rules"]
)
def test_trains_as_with_groups_by_hand(kind, closure, lr_rules):
    if lr_rules and kind in ONE_LR:
        pytest.skip("takes one lr only")
    found = []
    for rules in (None, RULES):
        for groups_of in (one_group, two_groups):
            torch.manual_seed(3)
            model = net()
            lr = None if lr_rules is None else OPTIMIZERS[kind](one_group(net())).param_groups[0]["lr"]
            groups = groups_of(model) if rules else cut(model, groups_of(model), lr)
            optimizer = OPTIMIZERS[kind](groups)
            if rules:
                apply_decay_rules(optimizer, model, rules, lr_rules=lr_rules)
            before = AsItWas(optimizer)
            if hasattr(optimizer, "train"):
                optimizer.train()
            train(model, optimizer, closure=closure)
            if hasattr(optimizer, "eval"):
                optimizer.eval()
                optimizer.train()
                train(model, optimizer, closure=closure)
            before.check(keys=False)  # some note their own counters there
            found.append(weights(model))
    by_hand, ours = found[:2], found[2:]
    for one, other in zip(by_hand, ours):
        assert all(map(torch.equal, one, other))


class Warm(schedulers.LRScheduler):
    """A user's own, with a value per group and a pair."""

    def __init__(self, optimizer, final_lrs, betas=(0.85, 0.95)):
        self.final_lrs, self.betas = final_lrs, betas
        super().__init__(optimizer)

    def get_lr(self):
        part = min(self.last_epoch / 5, 1.0)
        return [base + part * (final - base) for base, final in zip(self.base_lrs, self.final_lrs)]


class LikeTimm:
    """No scheduler of torch: takes values per group from the optimizer when it is made."""

    def __init__(self, optimizer):
        self.optimizer, self.steps = optimizer, 0
        self.base_values = [group["lr"] for group in optimizer.param_groups]

    def step(self):
        self.steps += 1
        for group, value in zip(self.optimizer.param_groups, self.base_values):
            group["lr"] = value * 0.5**self.steps


SCHEDULERS = {
    "LambdaLR": lambda o, values: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "LambdaLR of a list": lambda o, values: schedulers.LambdaLR(
        o, [lambda step, base=v: base**step for v in values(0.9, 0.5)]
    ),
    "MultiplicativeLR of a list": lambda o, values: schedulers.MultiplicativeLR(
        o, [lambda step, base=v: base for v in values(0.9, 0.5)]
    ),
    "StepLR": lambda o, values: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o, values: schedulers.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o, values: schedulers.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o, values: schedulers.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o, values: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o, values: schedulers.PolynomialLR(o, total_iters=9, power=2),
    "CosineAnnealingLR": lambda o, values: schedulers.CosineAnnealingLR(o, T_max=9, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o, values: schedulers.CosineAnnealingWarmRestarts(o, T_0=3),
    "OneCycleLR": lambda o, values: schedulers.OneCycleLR(o, max_lr=0.2, total_steps=20),
    "OneCycleLR of a list": lambda o, values: schedulers.OneCycleLR(o, values(0.2, 0.05), total_steps=20),
    "CyclicLR of lists": lambda o, values: schedulers.CyclicLR(
        o,
        values(0.01, 0.02),
        max_lr=values(0.1, 0.2),
        step_size_up=3,
        base_momentum=values(0.8, 0.7),
        max_momentum=values(0.9, 0.95),
    ),
    "SequentialLR": lambda o, values: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.7)], milestones=[2]
    ),
    "ChainedScheduler": lambda o, values: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, total_iters=3), schedulers.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau of a list": lambda o, values: schedulers.ReduceLROnPlateau(
        o, patience=0, threshold=10.0, min_lr=values(0.04, 0.001)
    ),
    "SWALR of a list": lambda o, values: torch.optim.swa_utils.SWALR(o, values(0.05, 0.01), anneal_epochs=5),
    "one of the user's own": lambda o, values: Warm(o, values(0.5, 0.01)),
    "one like timm's": lambda o, values: LikeTimm(o),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("applied", ["before", "after"])
def test_with_every_lr_scheduler(kind, applied):
    found = []
    for way in ("by hand", "rules"):
        model = net()
        groups = two_groups(model)
        groups[1]["lr"] = 0.02
        groups = groups if way == "rules" else cut(model, groups)
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=OWN)
        if way == "rules" and applied == "before":
            apply_decay_rules(optimizer, model, RULES)
        first = list(model[0].parameters())

        def values(one, other, optimizer=optimizer, first=first):
            return [one if any(p is q for p in g["params"] for q in first) else other for g in optimizer.param_groups]

        scheduler = SCHEDULERS[kind](optimizer, values)
        if way == "rules" and applied == "after":
            apply_decay_rules(optimizer, model, RULES)
        lrs = []

        def after(step, model=model, optimizer=optimizer, scheduler=scheduler, lrs=lrs):
            names = {p: i for i, p in enumerate(model.parameters())}
            in_force = groups_in_force(optimizer)
            lrs.append(sorted((names[p], float(group["lr"])) for group in in_force for p in group["params"]))
            scheduler.step(1.0) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else scheduler.step()

        train(model, optimizer, 6, after=after)
        assert len(optimizer.param_groups) == (2 if way == "rules" else 5)
        found.append((weights(model), lrs))
    (by_hand, lrs_by_hand), (ours, lrs) = found
    assert lrs == lrs_by_hand
    assert all(map(torch.equal, ours, by_hand))


@pytest.mark.parametrize("fused", [False, True])
def test_with_grad_scaler_that_skips_steps(fused):
    found = []
    for way in ("by hand", "rules"):
        model = net()
        optimizer = torch.optim.AdamW(
            one_group(model) if way == "rules" else cut(model, one_group(model)), weight_decay=OWN, fused=fused
        )
        if way == "rules":
            rules = {**RULES, "*": {"schedule": "constant", "start": 0.05}}
            apply_decay_rules(optimizer, model, rules)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
        for step in range(6):
            optimizer.zero_grad()
            loss = (model(torch.ones(2, 4)) ** 2).sum() * (math.inf if step in (0, 3) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(weights(model))
        if way == "rules":
            assert optimizer.param_groups[0]["decay_step"] == 4
    assert all(map(torch.equal, *found))


def test_with_gradient_clipping_and_accumulation():
    found = []
    for way in ("by hand", "rules"):
        model = net()
        groups = one_group(model) if way == "rules" else cut(model, one_group(model))
        optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=OWN)
        if way == "rules":
            apply_decay_rules(optimizer, model, RULES)
        generator = torch.Generator().manual_seed(5)
        for step in range(8):
            model(torch.randn(3, 4, generator=generator)).square().sum().backward()
            if step % 2:
                torch.nn.utils.clip_grad_norm_((p for g in optimizer.param_groups for p in g["params"]), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        found.append(weights(model))
    # Clipping goes over all parameters, in another order where the groups were cut by hand.
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*found))
