"""Muon beside AdamW from one set of rules, in optimizers that do both; where they are installed."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from helpers import digits_loader, trainer
from torch import nn

from lightning_regdecay import DecaySchedule, WeightDecayMixin, build_decay_groups, groups_in_force
from lightning_regdecay.rules.presets import muon_lr_rules, muon_rules

KEYS = {
    True: ("params", "lr", "momentum", "weight_decay", "use_muon"),
    False: ("params", "lr", "betas", "eps", "weight_decay", "use_muon"),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(64, 16)
        self.blocks = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
        self.table = nn.Embedding(10, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, pixels):
        return self.head(self.blocks(self.embed(pixels)).relu() + self.table.weight.mean(0))


def reference(param_groups):
    """Of ``muon-optimizer`` (0.1), which takes no keys but its own, and no closure."""
    base = pytest.importorskip("muon", reason="needs muon-optimizer").SingleDeviceMuonWithAuxAdam

    class Muon(base):
        def step(self, closure=None):
            loss = None if closure is None else closure()
            super().step()
            return loss

    return Muon([{key: group[key] for key in KEYS[group["use_muon"]] if key in group} for group in param_groups])


def pytorch_optimizers(param_groups):
    return pytest.importorskip("pytorch_optimizer").Muon(param_groups)


def timms(param_groups):
    return pytest.importorskip("timm.optim", exc_type=ImportError).Muon(param_groups)


OPTIMIZERS = {"reference": reference, "pytorch-optimizer": pytorch_optimizers, "timm": timms}
GIVEN = {"lr": 0.02, "adamw_lr": 3e-3, "heads": "*head.*"}


class Lit(WeightDecayMixin, L.LightningModule):
    decay_rules = muon_rules(0.1, adamw_weight_decay=0.05, **GIVEN)

    def __init__(self, build, key="use_muon"):
        super().__init__()
        self.build = build
        if key != "use_muon":
            self.decay_rules = muon_rules(0.1, adamw_weight_decay=0.05, key=key, **GIVEN)
        torch.manual_seed(0)
        self.net = Net()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self):
        return digits_loader()

    def build_optimizer(self, param_groups):
        return self.build(param_groups)

    def build_lr_scheduler(self, optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def test_the_groups():
    groups = build_decay_groups(Net(), muon_rules(0.1, adamw_weight_decay=0.05, **GIVEN))
    assert {group.name: (list(group.params), group.strength_text, group.treatment.options) for group in groups} == {
        "adamw_no_decay": (
            ["embed.bias", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias", "blocks.2.bias", "head.bias"],
            "0",
            {"use_muon": False, "lr": 3e-3},
        ),
        "adamw": (["table.weight", "head.weight"], "0.05", {"use_muon": False, "lr": 3e-3}),
        "muon": (["embed.weight", "blocks.0.weight", "blocks.2.weight"], "0.1", {"use_muon": True, "lr": 0.02}),
    }


@pytest.mark.parametrize(
    "vectors", [0.01, "1e-2", DecaySchedule("constant", 0.01), {"schedule": "constant", "start": 0.01}]
)
@pytest.mark.parametrize("marks", [True, False])
def test_vectors_that_decay_are_called_so(vectors, marks):
    groups = build_decay_groups(Net(), muon_rules(0.1, vectors=vectors, marks=marks, **GIVEN))
    assert groups.names == ["adamw_vectors", "adamw", "muon"]
    assert groups["adamw_vectors"].strength_text in ("0.01", "constant 0.01")


def test_the_other_key():
    groups = build_decay_groups(Net(), {"preset": "muon", "key": "use_fallback", "lr": "2e-2"})
    assert {g.name: g.treatment.options["use_fallback"] for g in groups} == {
        "adamw_no_decay": True,
        "adamw": True,
        "muon": False,
    }
    assert groups["muon"].rule.decay_mult == 1.0
    with pytest.raises(ValueError, match="key must be 'use_muon' or 'use_fallback', got 'muon'"):
        muon_rules(key="muon")


def test_matrices_alone():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 2))
    assert list(build_decay_groups(model, {"preset": "muon", "heads": "3.*"})["muon"].params) == [
        "0.weight",
        "2.weight",
    ]
    rules = {"preset": "muon", "heads": "3.*", "max_ndim": 2}
    assert list(build_decay_groups(model, rules)["muon"].params) == ["2.weight"]


def test_a_resnet():
    layer = nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3), "bn1": nn.BatchNorm2d(4)})
    model = nn.ModuleDict(
        {"conv1": nn.Conv2d(3, 4, 7), "bn1": nn.BatchNorm2d(4), "layer1": nn.Sequential(layer), "fc": nn.Linear(4, 2)}
    )
    groups = build_decay_groups(model, {"preset": "muon"})
    assert list(groups["muon"].params) == ["layer1.0.conv1.weight"]
    assert list(groups["adamw"].params) == ["conv1.weight", "fc.weight"]


def test_heads_that_are_none():
    with pytest.raises(TypeError, match="heads must be a pattern or a list of patterns, got 5"):
        muon_rules(heads=5)
    with pytest.raises(TypeError, match=r"heads must be a pattern or a list of patterns, got \[5\]"):
        muon_rules(heads=[5])


def test_crosses_other_rules():
    groups = build_decay_groups(Net(), {"preset": "ndim", "weight_decay": 0.1}, lr_rules=muon_lr_rules(heads="head.*"))
    assert groups.names == ["adamw.no_decay", "adamw.decay", "muon.decay"]


@pytest.mark.parametrize("kind", OPTIMIZERS)
class TestOptimizers:
    def test_trains_as_with_groups_by_hand(self, kind):
        model, hand = Lit(OPTIMIZERS[kind]), Lit(OPTIMIZERS[kind])
        run = trainer(max_epochs=2)
        run.fit(model)

        net = hand.net
        muon = {"use_muon": True, "lr": 0.02, "weight_decay": 0.1}
        adamw = {"use_muon": False, "lr": 3e-3}
        matrices = [net.embed.weight, net.blocks[0].weight, net.blocks[2].weight]
        others = [net.table.weight, net.head.weight]
        vectors = [p for p in net.parameters() if p.ndim < 2]
        optimizer = OPTIMIZERS[kind](
            [
                {"params": vectors, "weight_decay": 0.0, **adamw},
                {"params": others, "weight_decay": 0.05, **adamw},
                {"params": matrices, **muon},
            ]
        )
        for _ in range(2):
            for batch in digits_loader():
                optimizer.zero_grad()
                hand.training_step(batch, 0).backward()
                optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        assert all(map(torch.equal, model.parameters(), hand.parameters()))
        assert {group["name"]: group["weight_decay"] for group in groups_in_force(run.optimizers[0])} == {
            "adamw_no_decay": 0.0,
            "adamw": 0.05,
            "muon": 0.1,
        }

    def test_a_run_that_goes_on_is_that_of_one(self, kind, tmp_path):
        found = []
        for stops in ([3], [1, 3]):
            model, path = Lit(OPTIMIZERS[kind]), None
            for epochs in stops:
                run = trainer(max_epochs=epochs)
                run.fit(model, ckpt_path=path, weights_only=True) if path else run.fit(model)
                path = tmp_path / f"{epochs}.ckpt"
                run.save_checkpoint(path)
                model = Lit(OPTIMIZERS[kind]) if epochs != stops[-1] else model
            found.append([parameter.detach().clone() for parameter in model.parameters()])
        assert all(map(torch.equal, *found))


def test_timms_own_key(tmp_path):
    model, other = Lit(timms), Lit(timms, key="use_fallback")
    trainer(max_epochs=1).fit(model)
    trainer(max_epochs=1).fit(other)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_groups_without_names_are_named_by_their_members():
    class OwnKeys(torch.optim.AdamW):
        """Takes no keys but its own, and sorts its parameters."""

        def __init__(self, groups):
            for group in groups:
                assert set(group) <= {"params", "weight_decay"}
            super().__init__([{**g, "params": sorted(g["params"], key=torch.numel)} for g in groups])

    class Strict(Lit):
        decay_rules = {"*.bias": 0.0, "*": 0.2}

    def build(groups):
        return OwnKeys([{key: group[key] for key in ("params", "weight_decay")} for group in groups])

    run = trainer(max_epochs=1)
    model = Strict(build)
    run.fit(model)
    by_name = dict(model.named_parameters())
    for group in groups_in_force(run.optimizers[0]):
        assert group["weight_decay"] == (0.0 if group["name"] == "bias" else 0.2)
        assert [id(by_name[name]) for name in group["param_names"]] == list(map(id, group["params"]))
