"""λ within a tensor, and decay toward a start: to the bit what separate tensors, or a loop by hand, would give."""

from __future__ import annotations

import copy
import io

import lightning as L
import pytest
import torch
from helpers import trainer
from optim.by_hand import AsItWas
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_regdecay import (
    DecayRule,
    DecaySchedule,
    WeightDecayMixin,
    WeightDecayRules,
    apply_decay_rules,
    build_decay_groups,
    compare,
    groups_in_force,
)

LR, OWN = 0.05, 0.02
PIXELS = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))
INSIDE = {
    "qkv": {"params": "0.*", "blocks": ["q", "k", "v"], "weight_decay": {"q": 0.1, "k": 0.5, "v": 0.0}},
    "last": {"params": "2.weight", "rows": "1:", "weight_decay": 0.3},
    "columns": {"params": "1.weight", "dim": 1, "rows": [0, 2, 5], "decay_mult": 3.0},
    "*": 0.05,
}
STRENGTHS = {"q": 0.1, "k": 0.5, "v": 0.0, "last": 0.3, "columns": 3 * OWN, "rest": 0.05}
OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "AdamW maximize": (torch.optim.AdamW, {"maximize": True}),
    "AdamW with a tensor lr": (torch.optim.AdamW, {"lr": torch.tensor(LR), "foreach": False}),
    "Adam": (torch.optim.Adam, {}),
    "Adam foreach": (torch.optim.Adam, {"foreach": True}),
    "Adam maximize": (torch.optim.Adam, {"maximize": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "NAdam decoupled": (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "SGD": (torch.optim.SGD, {}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGD foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
}
FUSED = {f"{name} fused": (getattr(torch.optim, name), {"fused": True}) for name in ("AdamW", "Adam", "SGD")}


def build(kind, groups, **options):
    cls, own = {**OPTIMIZERS, **FUSED}[kind]
    own = {"lr": LR, "weight_decay": OWN, **own, **options}
    return cls(groups, **{name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in own.items()})


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 3))


class Apart(nn.Module):
    """The same network of tensors that are apart, each in the group that INSIDE makes of it."""

    def __init__(self):
        super().__init__()
        first, second, third = net()
        columns = [0, 2, 5]
        others = [n for n in range(9) if n not in columns]
        self.order = torch.tensor(columns + others).argsort()
        parts = {
            **{f"{n}0": part for n, part in zip("qkv", first.weight.data.chunk(3))},
            **{f"{n}1": part for n, part in zip("qkv", first.bias.data.chunk(3))},
            "columns0": second.weight.data[:, columns],
            "rest0": second.weight.data[:, others],
            "rest1": second.bias.data,
            "rest2": third.weight.data[:1],
            "last0": third.weight.data[1:],
            "rest3": third.bias.data,
        }
        self.parts = nn.ParameterDict({name: nn.Parameter(part.clone()) for name, part in parts.items()})

    def whole(self):
        p = self.parts
        return [
            torch.cat([p["q0"], p["k0"], p["v0"]]),
            torch.cat([p["q1"], p["k1"], p["v1"]]),
            torch.cat([p["columns0"], p["rest0"]], 1)[:, self.order],
            p["rest1"],
            torch.cat([p["rest2"], p["last0"]]),
            p["rest3"],
        ]

    def forward(self, x):
        w = self.whole()
        return nn.functional.linear(nn.functional.linear(nn.functional.linear(x, w[0], w[1]), w[2], w[3]), w[4], w[5])

    def groups(self):
        found = {}
        for name, parameter in self.parts.items():
            found.setdefault(name[:-1], []).append(parameter)
        return [{"params": params, "weight_decay": STRENGTHS[name]} for name, params in found.items()]


def loss_of(model):
    return (model(PIXELS) - TARGETS).square().mean()


def train(model, optimizer, steps=5, *, closure=False, before=None, scheduler=None):
    def compute():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        return loss

    for _ in range(steps):
        if closure:
            optimizer.step(compute)
        else:
            compute()
            if before is not None:
                before()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()


class LitOver(WeightDecayMixin, L.LightningModule):
    """A network's layers, under their own names."""

    def __init__(self, model, rules, kind="AdamW"):
        super().__init__()
        self.decay_rules, self.kind = rules, kind
        for name, layer in model.named_children():
            self.add_module(name, layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[1]).square().mean()

    def train_dataloader(self):
        return DataLoader(TensorDataset(PIXELS, TARGETS), batch_size=16)

    def build_optimizer(self, param_groups):
        return build(self.kind, param_groups)


def trained_apart(kind, **options):
    apart = Apart()
    optimizer = build(kind, apart.groups())
    train(apart, optimizer, scheduler=options.get("scheduler", lambda optimizer: None)(optimizer))
    return apart.whole()


@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_parts_of_tensors_train_as_tensors_of_their_own(kind, closure):
    model = net()
    optimizer = build(kind, [{"params": model.parameters()}])
    apply_decay_rules(optimizer, model, INSIDE)
    before = AsItWas(optimizer)
    train(model, optimizer, closure=closure)
    before.check()
    assert all(map(torch.equal, model.parameters(), trained_apart(kind)))


@pytest.mark.parametrize("kind", FUSED)
def test_and_to_rounding_where_the_step_is_one_kernel(kind):
    model = net()
    optimizer = build(kind, [{"params": model.parameters()}])
    apply_decay_rules(optimizer, model, INSIDE)
    train(model, optimizer)
    for ours, theirs in zip(model.parameters(), trained_apart(kind)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["AdamW", "SGD with momentum"])
def test_the_same_in_an_optimizer_that_the_mixin_builds(kind):
    model = net()
    lit = LitOver(model, INSIDE, kind)
    optimizer = lit.configure_optimizers()
    assert [group["name"] for group in optimizer.param_groups] == [
        "rest",
        "qkv.q-qkv.k-qkv.v",
        "columns-rest",
        "last-rest",
    ]
    train(model, optimizer)
    assert all(map(torch.equal, model.parameters(), trained_apart(kind)))
    found = {
        group["name"]: (group["weight_decay"], sorted(group["param_names"])) for group in groups_in_force(optimizer)
    }
    assert found == {
        "rest": (0.05, ["1.bias", "1.weight", "2.bias", "2.weight"]),
        "qkv.q": (0.1, ["0.bias", "0.weight"]),
        "qkv.k": (0.5, ["0.bias", "0.weight"]),
        "qkv.v": (0.0, ["0.bias", "0.weight"]),
        "last": (0.3, ["2.weight"]),
        "columns": (pytest.approx(3 * OWN), ["1.weight"]),
    }


@pytest.mark.parametrize("bring", ["mixin", "callback", "mixin over theirs"])
def test_the_same_in_a_fit_with_clipping_after_the_backward_pass(bring):
    """Inside a fit backward and clipping happen in the step, after a step pre-hook."""
    model = net()
    rules = None if bring == "callback" else INSIDE

    class LitTheirs(LitOver):
        def configure_optimizers(self):
            return build("AdamW", [{"params": self.parameters()}])

    lit = LitOver(model, rules) if bring == "mixin" else LitTheirs(model, rules)
    callbacks = [WeightDecayRules(INSIDE)] if bring == "callback" else []
    trainer(max_epochs=5, callbacks=callbacks, gradient_clip_val=1e9).fit(lit)
    assert all(map(torch.equal, model.parameters(), trained_apart("AdamW")))


def test_lr_schedulers_and_lr_rules_go_on_as_ever():
    def scheduler(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    model, twin = net(), net()
    optimizer = build("AdamW", [{"params": model.parameters()}])
    apply_decay_rules(optimizer, model, INSIDE)
    train(model, optimizer, scheduler=scheduler(optimizer))
    assert all(map(torch.equal, model.parameters(), trained_apart("AdamW", scheduler=scheduler)))
    # A factor on the lr is one on lr·λ, too.
    slow = build("AdamW", [{"params": twin.parameters()}])
    apply_decay_rules(slow, twin, INSIDE, lr_rules={"*": {"lr_mult": 0.5}})
    for group in slow.param_groups:
        group["lr"] = 2 * LR
    train(twin, slow, scheduler=scheduler(slow))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_schedules_hold_for_parts():
    falling = {"schedule": "linear", "start": 0.5, "end": 0.0, "steps": 4}
    rules = {"top": {"params": "2.weight", "rows": "1:", "weight_decay": falling}, "*": 0.05}
    model = net()
    optimizer = build("AdamW", [{"params": model.parameters()}])
    apply_decay_rules(optimizer, model, rules)
    twin = net()
    hand = build("AdamW", [{"params": twin.parameters()}], weight_decay=0.0)
    for step in range(5):
        train(model, optimizer, 1)

        decay = 0.5 * (1 - min(step / 4, 1))

        def before(decay=decay):
            with torch.no_grad():
                for p in twin.parameters():
                    if p is not twin[2].weight:
                        p.mul_(1 - LR * 0.05)
                twin[2].weight[:1].mul_(1 - LR * 0.05)
                twin[2].weight[1:].mul_(1 - LR * decay)

        train(twin, hand, 1, before=before)
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
        assert {g["name"]: g["weight_decay"] for g in groups_in_force(optimizer)}["top"] == 0.5 * (1 - min(step / 4, 1))


def test_rows_of_an_embedding_without_gradient_stay_where_they_are():
    torch.manual_seed(0)
    table = nn.Embedding(7, 4, padding_idx=0)
    start = table.weight.detach().clone()
    rules = {
        "padding": {"modules": nn.Embedding, "rows": "padding", "weight_decay": 0.0},
        "new": {"params": "weight", "rows": "5:", "weight_decay": 0.0},
        "*": 0.5,
    }
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1)
    apply_decay_rules(optimizer, table, rules)
    for _ in range(3):
        optimizer.zero_grad()
        table(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    moved = [not torch.equal(now, before) for now, before in zip(table.weight, start)]
    assert moved == [False, True, True, True, True, False, False]
    torch.testing.assert_close(table.weight[3:5], start[3:5] * (1 - 0.05) ** 3)


def toward(start="start", **fields):
    return {"back": {"params": "0.*", "weight_decay": 0.4, "toward": start, **fields}, "*": 0.05}


def by_hand(kind, steps=5, model=None, start=None):
    """A loop by hand that decays the first layer toward its start."""
    model = net() if model is None else model
    decays = [(p, 0.4 if name.startswith("0.") else 0.05) for name, p in model.named_parameters()]
    start = start or [p.detach().clone() for p in model[0].parameters()]
    starts = dict(zip(model[0].parameters(), start))
    optimizer = build(kind, [{"params": model.parameters()}], weight_decay=0.0)

    @torch.no_grad()
    def before():
        for p, decay in decays:
            if "AdamW" in kind:
                p.mul_(1 - LR * decay)
                if p in starts:
                    p.add_(starts[p], alpha=LR * decay)
            else:
                p.grad.add_(p - starts[p] if p in starts else p, alpha=decay)

    train(model, optimizer, steps, before=before)
    return list(model.parameters())


class TestTowardAStart:
    @pytest.mark.parametrize("kind", ["AdamW", "AdamW foreach", "Adam", "SGD with momentum", "RMSprop"])
    def test_is_what_a_loop_by_hand_does(self, kind):
        model = net()
        optimizer = build(kind, [{"params": model.parameters()}])
        apply_decay_rules(optimizer, model, toward())
        train(model, optimizer)
        assert all(map(torch.equal, model.parameters(), by_hand(kind)))

    @pytest.mark.parametrize("kind", [*OPTIMIZERS, *FUSED])
    def test_toward_zero_is_todays_decay(self, kind):
        model, twin = net(), net()
        optimizer, other = build(kind, [{"params": model.parameters()}]), build(kind, [{"params": twin.parameters()}])
        zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        apply_decay_rules(optimizer, model, toward(zeros))
        apply_decay_rules(other, twin, {"0.*": 0.4, "*": 0.05})
        train(model, optimizer)
        train(twin, other)
        for ours, theirs in zip(model.parameters(), twin.parameters()):
            assert torch.equal(ours, theirs) or "fused" in kind
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)

    def test_without_gradient_weights_come_back(self):
        weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        module = nn.ParameterDict({"w": weight})
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        apply_decay_rules(optimizer, module, {"w": {"weight_decay": 1.0, "toward": "start"}})
        for step in range(100):
            weight.grad = torch.zeros(3)
            if step == 0:
                weight.grad += 1.0
            optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.tensor([1.0, -2.0, 3.0]), rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("fields", [{}, {"toward_dtype": "bfloat16"}, {"toward_device": "cpu"}])
    @pytest.mark.parametrize("kind", ["AdamW", "SGD"])
    def test_a_resumed_run_decays_toward_the_same_start(self, kind, fields):
        model = net()
        optimizer = build(kind, [{"params": model.parameters()}])
        apply_decay_rules(optimizer, model, toward(**fields))
        train(model, optimizer, 3)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        train(model, optimizer, 3)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        twin = net()
        twin.load_state_dict(saved["model"])
        other = build(kind, [{"params": twin.parameters()}])
        apply_decay_rules(other, twin, toward(**fields))
        other.load_state_dict(saved["optimizer"])
        train(twin, other, 3)
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
        kept = other.state[twin[0].weight]["decay_start"]
        assert kept.dtype == (torch.bfloat16 if "toward_dtype" in fields else torch.float32)

    @pytest.mark.parametrize("bring", ["mixin", "callback"])
    def test_a_resumed_fit_does_too(self, bring, tmp_path):
        class LitTheirs(LitOver):
            def configure_optimizers(self):
                return build("AdamW", [{"params": self.parameters()}])

        def fit(epochs, checkpoint=None):
            model = net()
            lit = LitOver(model, toward()) if bring == "mixin" else LitTheirs(model, None)
            run = trainer(max_epochs=epochs, callbacks=[] if bring == "mixin" else [WeightDecayRules(toward())])
            run.fit(lit, ckpt_path=checkpoint)
            return run, model

        run, _ = fit(3)
        run.save_checkpoint(tmp_path / "last.ckpt")  # after the fit
        torch.load(tmp_path / "last.ckpt", weights_only=True)
        _, resumed = fit(5, tmp_path / "last.ckpt")
        assert all(map(torch.equal, resumed.parameters(), by_hand("AdamW")))

    def test_the_start_is_that_after_pretrained_weights_were_loaded(self):
        model = net()
        optimizer = build("AdamW", [{"params": model.parameters()}])
        apply_decay_rules(optimizer, model, toward())
        twin = copy.deepcopy(model)
        for one in (model, twin):
            one[0].weight.data.fill_(0.25)
        train(model, optimizer)
        assert all(map(torch.equal, model.parameters(), by_hand("AdamW", model=twin)))

    @pytest.mark.parametrize("form", ["state dict", "file", "checkpoint"])
    def test_the_start_may_be_given(self, form, tmp_path):
        torch.manual_seed(5)
        given = {name: torch.randn_like(p) for name, p in net().named_parameters()}
        start = given
        if form != "state dict":
            start = tmp_path / "weights.ckpt"
            torch.save(given if form == "file" else {"state_dict": given, "epoch": 3}, start)
        model = net()
        optimizer = build("AdamW", [{"params": model.parameters()}])
        apply_decay_rules(optimizer, model, toward(start))
        if form != "state dict":
            start.unlink()  # it was read, once
        train(model, optimizer)
        expected = by_hand("AdamW", start=[given["0.weight"], given["0.bias"]])
        assert all(map(torch.equal, model.parameters(), expected))
        assert "decay_start" not in optimizer.state[model[0].weight]

    def test_rows_can_decay_toward_a_start(self):
        rules = {"some": {"params": "0.weight", "rows": "2:5", "weight_decay": 0.4, "toward": "start"}, "*": 0.0}
        model, twin = net(), net()
        optimizer = build("AdamW", [{"params": model.parameters()}])
        apply_decay_rules(optimizer, model, rules)
        train(model, optimizer)
        hand, start = build("AdamW", [{"params": twin.parameters()}], weight_decay=0.0), twin[0].weight.detach().clone()

        @torch.no_grad()
        def before():
            twin[0].weight[2:5] = twin[0].weight[2:5].mul(1 - LR * 0.4).add(start[2:5], alpha=LR * 0.4)

        train(twin, hand, before=before)
        assert all(map(torch.equal, model.parameters(), twin.parameters()))

    def test_a_second_fit_begins_anew(self):
        class LitKeeping(LitOver):
            def configure_optimizers(self):
                self.kept = getattr(self, "kept", None) or build("AdamW", [{"params": self.parameters()}])
                return self.kept

        model = net()
        lit = LitKeeping(model, toward())
        trainer(max_epochs=3).fit(lit)
        again = model[0].weight.detach().clone()
        trainer(max_epochs=1).fit(lit)
        assert torch.equal(lit.kept.state[model[0].weight]["decay_start"], again)

    def test_a_state_that_somebody_emptied_is_no_new_start(self):
        model = net()
        optimizer = build("SGD with momentum", [{"params": model.parameters()}])
        start = model[0].weight.detach().clone()
        apply_decay_rules(optimizer, model, toward())
        train(model, optimizer, 2)
        optimizer.state.clear()
        train(model, optimizer, 1)
        assert torch.equal(optimizer.state[model[0].weight]["decay_start"], start)

    def test_rules_without_it_forget_it(self):
        model = net()
        optimizer = build("AdamW", [{"params": model.parameters()}])
        apply_decay_rules(optimizer, model, toward())
        train(model, optimizer, 2)
        apply_decay_rules(optimizer, model, {"*": 0.1})
        assert "decay_start" not in optimizer.state[model[0].weight]
        train(model, optimizer, 1)
        apply_decay_rules(optimizer, model, toward())
        now = model[0].weight.detach().clone()
        with pytest.warns(UserWarning, match=r"the start of .* is not known"):
            train(model, optimizer, 1)
        assert torch.equal(optimizer.state[model[0].weight]["decay_start"], now)

    def test_what_a_rehearsal_has_put_there_is_no_start(self):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        model = net()
        optimizer = build("AdamW", [{"params": model.parameters()}])
        apply_decay_rules(optimizer, model, toward())
        get_optimizer_state_dict(model, optimizer)
        model[0].weight.data.fill_(0.25)
        train(model, optimizer, 1)
        assert torch.equal(optimizer.state[model[0].weight]["decay_start"], torch.full((9, 6), 0.25))

    def test_an_optimizer_that_leaves_a_parameter_out_of_a_step_is_found_out(self):
        class Lazy(torch.optim.AdamW):
            steps = 0

            def step(self, closure=None):
                loss = closure() if closure is not None else None
                self.steps += 1
                held = (
                    [(p, p.grad) for group in self.param_groups for p in group["params"]][:1] if self.steps == 1 else []
                )
                for p, _ in held:
                    p.grad = None
                super().step()
                for p, grad in held:
                    p.grad = grad
                return loss

        model = net()
        optimizer = Lazy(model.parameters(), lr=LR, weight_decay=OWN)
        start = model[0].weight.detach().clone()
        with pytest.raises(ValueError, match="cannot: it was tried"):  # decay without a step is found out
            apply_decay_rules(optimizer, model, toward())
        assert torch.equal(model[0].weight, start)

    def test_a_wide_start_stays_wide_when_it_is_loaded(self):
        def make():
            torch.manual_seed(0)
            module = nn.Linear(6, 4).to(torch.bfloat16)
            optimizer = torch.optim.AdamW(module.parameters(), lr=LR)
            apply_decay_rules(optimizer, module, {"*": {"weight_decay": 0.4, "toward": given, **kept}})
            return module, optimizer

        kept = {"toward_dtype": "float32"}
        given = "start"
        module, optimizer = make()
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        wide = optimizer.state[module.weight]["decay_start"]
        wide += 1e-4  # which bfloat16 does not have
        twin, other = make()
        other.load_state_dict(optimizer.state_dict())
        assert torch.equal(other.state[twin.weight]["decay_start"], wide)

    def test_a_given_start_of_a_tied_weight_goes_by_any_name(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(4, 7, bias=False)
                self.emb = nn.Embedding(7, 4)
                self.emb.weight = self.head.weight

        model = Tied()
        optimizer = torch.optim.AdamW(model.parameters())
        given = {"emb.weight": torch.zeros(7, 4)}
        apply_decay_rules(optimizer, model, {"*": {"weight_decay": 0.1, "toward": given}})
        assert len(groups_in_force(optimizer)) == 1

    def test_a_start_in_a_narrow_type_is_the_same_with_a_tensor_lr(self):
        ends = []
        for lr in (LR, torch.tensor(LR)):
            weight = nn.Parameter(torch.full((3,), 1.001))
            module = nn.ParameterDict({"w": weight})
            optimizer = torch.optim.AdamW([weight], lr=lr, foreach=False)
            rules = {"w": {"weight_decay": 5.0, "toward": "start", "toward_dtype": "bfloat16"}}
            apply_decay_rules(optimizer, module, rules)
            for _ in range(200):
                weight.grad = torch.zeros(3)
                optimizer.step()
            ends.append(weight.detach())
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=0)

    def test_a_run_that_goes_on_without_a_start_says_so(self):
        model = net()
        optimizer = build("AdamW", [{"params": model.parameters()}])
        train(model, optimizer, 2)
        apply_decay_rules(optimizer, model, toward())
        with pytest.warns(UserWarning, match=r"the start of .* is not known"):
            train(model, optimizer, 1)

    def test_the_table_tells_what_it_takes(self):
        cells = str(build_decay_groups(net(), toward())).splitlines()[1]
        assert "0.4 toward start (252 B)" in cells
        assert "(126 B)" in str(build_decay_groups(net(), toward(toward_dtype="bfloat16")))


class TestNothingIsLeftBehind:
    def test_gradients_are_those_of_the_loss_after_the_step(self):
        model, twin = net(), net()
        optimizer = build("Adam", [{"params": model.parameters()}])
        apply_decay_rules(optimizer, model, INSIDE)
        own = [p.grad for p in model.parameters()]
        optimizer.zero_grad()
        for one in (model, twin):
            loss_of(one).backward()
        own = [p.grad for p in model.parameters()]
        optimizer.step()
        assert all(p.grad is grad for p, grad in zip(model.parameters(), own))
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters()))

    def test_nor_after_a_step_that_failed(self):
        class Failing(torch.optim.Adam):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.fails = False

            def step(self, closure=None):
                if self.fails:
                    raise RuntimeError("out of luck")
                return super().step(closure)

        model = net()
        optimizer = Failing(model.parameters(), lr=LR, weight_decay=OWN)
        apply_decay_rules(optimizer, model, INSIDE)
        loss_of(model).backward()
        own = [p.grad for p in model.parameters()]
        optimizer.fails = True
        with pytest.raises(RuntimeError, match="out of luck"):
            optimizer.step()
        assert all(p.grad is grad for p, grad in zip(model.parameters(), own))
        assert len(optimizer.param_groups) == 1

    def test_a_step_that_super_calls_again_decays_once(self):
        class Sub(torch.optim.AdamW):
            def step(self, closure=None):
                return super().step(closure)

        for closure in (False, True):
            model = net()
            optimizer = Sub(model.parameters(), lr=LR, weight_decay=OWN)
            apply_decay_rules(optimizer, model, INSIDE)
            train(model, optimizer, closure=closure)
            assert all(map(torch.equal, model.parameters(), trained_apart("AdamW")))

    def test_scaled_gradients_that_overflow_move_nothing(self):
        model = net()
        optimizer = build("AdamW fused", [{"params": model.parameters()}])
        apply_decay_rules(optimizer, model, INSIDE)
        before = [p.detach().clone() for p in model.parameters()]
        loss_of(model).backward()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
        optimizer.step()
        assert all(map(torch.equal, model.parameters(), before))

    def test_scaled_gradients_decay_with_their_scale(self):
        model, twin = net(), net()
        for one, scale in ((model, 1024.0), (twin, 1.0)):
            optimizer = build("SGD fused", [{"params": one.parameters()}])
            apply_decay_rules(optimizer, one, INSIDE)
            (scale * loss_of(one)).backward()
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            optimizer.step()
        for ours, theirs in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(ours, theirs)


class TestMistakes:
    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            ({"rows": "10:"}, r"does not fit '0.weight', of shape \(9, 6\): rows '10:' go beyond the 9"),
            ({"rows": "3:3"}, "rows '3:3' are none of the 9"),
            ({"rows": [9]}, "row 9 is not among the 9"),
            ({"rows": 620}, "a slice stands in quotes, as YAML takes 10:20"),
            ({"rows": "ten"}, "must be a slice as text"),
            ({"rows": []}, "an empty list, which takes nothing"),
            ({"rows": ":2", "dim": 2}, "it has no dimension 2"),
            ({"rows": lambda name, shape: [True]}, "must give a mask of 9 entries"),
            ({"rows": lambda name, shape: 1 / 0}, "the function for rows failed on parameter '0.weight'"),
            ({"rows": ":2", "blocks": 3}, "give one of them"),
            ({"dim": 1}, "dim needs rows or blocks"),
            ({"blocks": 2}, "a dimension of 9 has no 2 equal blocks"),
            ({"blocks": {"q": 5, "k": 6}}, "its blocks are 11 in all, and the dimension is 9"),
            ({"blocks": {"q": 0}}, "must be a whole number of at least 1"),
            ({"blocks": ["q", "q"]}, "two names or more, each once"),
            ({"blocks": ["q", "k", "v"], "block": "w"}, "unknown block 'w'"),
            ({"block": "q"}, "needs blocks"),
            ({"blocks": ["q", "k", "v"], "weight_decay": {"q": 0.1}}, "not given for block 'k'"),
            ({"blocks": ["q", "k", "v"], "weight_decay": {"w": 0.1}}, "an unknown block 'w'"),
            ({"rows": ":2", "lr_mult": 0.1}, "lr_mult cannot be given for a part of a tensor"),
            ({"rows": ":2", "options": {"lr": 0.1}}, r"the options \['lr'\] cannot be given for a part"),
            ({"toward": "strat"}, "there is no such file; write toward='start'"),
            ({"toward": {"0.weigth": torch.ones(9, 6)}}, "has no weights of that name; nearest: '0.weigth'"),
            ({"toward": {"0.weight": torch.ones(6, 9)}}, r"has shape \(6, 9\) there, and the parameter is of shape"),
            ({"toward": {}}, "an empty state dict"),
            ({"toward": 3}, "must be 'start', the path of a file or a state dict"),
            ({"toward": "start", "toward_dtype": "int8"}, "toward_dtype must be one of"),
            ({"toward_device": "cpu"}, "give toward, too"),
            ({"toward": "start", "toward_device": "cuda"}, "toward_device must be 'cpu'"),
        ],
    )
    def test_is_told_before_the_first_step(self, rule, message):
        model = net()
        optimizer = build("AdamW", [{"params": model.parameters()}])
        before = AsItWas(optimizer)
        with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
            apply_decay_rules(optimizer, model, {"some": {"params": "0.weight", "weight_decay": 0.1, **rule}, "*": 0.0})
        before.check()
        assert len(groups_in_force(optimizer)) == 1

    def test_parts_that_overlap(self):
        rules = {
            "a": {"params": "0.weight", "rows": ":4", "weight_decay": 0.1},
            "b": {"params": "0.weight", "rows": "3:", "weight_decay": 0.2},
        }
        with pytest.raises(ValueError, match=r"rows :4' and decay rule 2 '.*rows 3:' both take"):
            build_decay_groups(net(), rules)

    def test_what_nothing_is_left_for(self):
        rules = {"a": {"params": "0.weight", "blocks": 3, "weight_decay": 0.1}, "0.weight": 0.2, "*": 0.0}
        with pytest.raises(ValueError, match=r"rule 4 .* takes nothing"):
            build_decay_groups(net(), rules)

    @pytest.mark.parametrize("rules", [INSIDE, toward()], ids=["inside", "toward"])
    @pytest.mark.parametrize(
        "kind",
        [
            lambda params: torch.optim.Adafactor(params, weight_decay=0.1),
            lambda params: pytest.importorskip("schedulefree").AdamWScheduleFree(params, weight_decay=0.1),
            lambda params: pytest.importorskip("pytorch_optimizer").Adan(params, weight_decay=0.1),
            lambda params: torch.optim.LBFGS(params),
        ],
        ids=["Adafactor", "schedule-free", "Adan", "LBFGS"],
    )
    def test_an_optimizer_that_decays_in_another_way_is_refused(self, kind, rules):
        model = net()
        optimizer = kind(model.parameters())
        before = AsItWas(optimizer)
        with pytest.raises(
            ValueError, match=r"which .* cannot: it was tried|knows no weight decay|takes one param group"
        ):
            apply_decay_rules(optimizer, model, rules)
        before.check()

    @pytest.mark.parametrize(
        "name",
        ["RAdam", "AdaShift", "ScheduleFreeRAdam", "DAdaptAdan", "MARS", "SGDP", "AdamP", "Ranger", "StableAdamW"],
    )
    def test_one_that_warms_up_projects_or_averages_is_found_out(self, name):
        model = net()
        optimizer = getattr(pytest.importorskip("pytorch_optimizer"), name)(model.parameters(), weight_decay=0.1)
        with pytest.raises(ValueError, match="cannot: it was tried"):
            apply_decay_rules(optimizer, model, INSIDE)

    @pytest.mark.parametrize("how", ["clips", "skips", "tiny"])
    def test_one_that_does_more_in_its_step_is_found_out(self, how):
        class Own(torch.optim.SGD if how == "clips" else torch.optim.AdamW):
            def step(self, closure=None):
                with torch.enable_grad():
                    loss = closure() if closure is not None else None
                params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
                if how == "clips":
                    nn.utils.clip_grad_norm_(params, 10.0)
                if how == "skips" and any(not p.grad.isfinite().all() for p in params):
                    return loss
                scale = 1e-7 if how == "tiny" else 1.0
                for group in self.param_groups:
                    group["lr"] *= scale
                super().step()
                for group in self.param_groups:
                    group["lr"] /= scale
                return loss

        model = net()
        options = {"momentum": 0.9} if how == "clips" else {}  # without it, it can be done before the clipping
        with pytest.raises(ValueError, match="cannot: it was tried"):
            apply_decay_rules(Own(model.parameters(), lr=LR, weight_decay=OWN, **options), model, INSIDE)

    @pytest.mark.parametrize(
        "rest", [{"lr_mult": 0.1}, {"options": {"lr": 1e-4}}, {"lr_mult": 0.0}, {"options": {"betas": (0.5, 0.9)}}]
    )
    def test_a_rule_for_the_rest_with_what_is_of_whole_tensors(self, rest):
        rules = [DecayRule(0.3, params="0.weight", rows="3:"), DecayRule(0.1, group="slow", **rest)]
        with pytest.raises(ValueError, match=r"'0.weight' is in parts .* differ in lr_mult or options"):
            build_decay_groups(net(), rules)

    def test_a_start_that_is_kept_in_two_ways(self):
        kept = {"params": "0.weight", "weight_decay": 0.1, "toward": "start"}
        rules = {"a": {**kept, "rows": ":2", "toward_dtype": "bfloat16"}, "b": kept, "*": 0.0}
        with pytest.raises(ValueError, match="which is kept once: give all of them the same"):
            build_decay_groups(net(), rules)

    def test_a_complex_start_in_real_numbers(self):
        module = nn.ParameterDict({"w": nn.Parameter(torch.ones(2, dtype=torch.complex64))})
        rules = {"w": {"weight_decay": 0.1, "toward": "start", "toward_dtype": "bfloat16"}}
        with pytest.raises(ValueError, match="would keep the real part of its start alone"):
            apply_decay_rules(torch.optim.AdamW(module.parameters()), module, rules)

    def test_coupled_decay_of_sparse_gradients_moves_nothing(self):
        model = nn.ModuleDict({"emb": nn.Embedding(5, 2, sparse=True), "lin": nn.Linear(2, 2)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        apply_decay_rules(
            optimizer, model, {"some": {"params": "*.weight", "rows": ":2", "weight_decay": 0.5}, "*": 0.1}
        )
        model["lin"](model["emb"](torch.tensor([1, 2]))).sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        own = [p.grad for p in model.parameters()]
        with pytest.raises(RuntimeError, match="a sparse gradient takes no coupled weight decay"):
            optimizer.step()
        assert all(map(torch.equal, model.parameters(), before))
        assert all(p.grad is grad for p, grad in zip(model.parameters(), own))

    def test_a_start_of_another_shape_in_a_checkpoint_moves_nothing(self):
        model, grown = nn.Embedding(3, 4), nn.Embedding(5, 4)
        rules = {"*": {"weight_decay": 0.5, "toward": "start"}}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        apply_decay_rules(optimizer, model, rules)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        other = torch.optim.SGD(grown.parameters(), lr=0.1)
        apply_decay_rules(other, grown, rules)
        other.load_state_dict(optimizer.state_dict())
        before = grown.weight.detach().clone()
        grown.weight.grad = torch.ones_like(grown.weight)
        with pytest.raises(ValueError, match=r"of shape \(3, 4\) in the state .* is of shape \(5, 4\)"):
            other.step()
        assert torch.equal(grown.weight, before)

    @pytest.mark.parametrize("rows", [lambda name, shape: [True] * 3, lambda name, shape: torch.ones(9, 6)])
    def test_an_optional_rule_excuses_no_wrong_mask(self, rows):
        rules = [DecayRule(0.1, params="0.weight", rows=rows, optional=True), DecayRule(0.0)]
        with pytest.raises(ValueError, match="must give a mask of 9 entries"):
            build_decay_groups(net(), rules)

    def test_rows_of_which_there_are_none(self):
        rules = {
            "some": {"params": "0.weight", "rows": lambda name, shape: [False] * shape[0], "weight_decay": 1},
            "*": 0,
        }
        with pytest.raises(ValueError, match="takes nothing: it has no rows of the parameters that it matches"):
            build_decay_groups(net(), rules)

    @pytest.mark.parametrize("rules", [INSIDE, toward()], ids=["inside", "toward"])
    def test_param_groups_by_hand_cannot_say_it(self, rules):
        groups = build_decay_groups(net(), rules)
        with pytest.raises(ValueError, match="which no param group can say"):
            torch.optim.AdamW(groups.as_param_groups(weight_decay=0.1))

    def test_several_calls_of_a_closure_in_a_step(self):
        class Twice(torch.optim.SGD):
            calls = 1

            def step(self, closure=None):
                for _ in range(self.calls):
                    closure()
                return super().step()

        model = net()
        optimizer = Twice(model.parameters(), lr=LR, weight_decay=OWN)
        with pytest.raises(ValueError, match="cannot: it was tried"):  # it needs one
            apply_decay_rules(optimizer, model, INSIDE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("foreach", [False, True])
def test_half_types_round_as_the_optimizer_does(dtype, foreach):
    torch.manual_seed(0)
    values = torch.randn(6, 40).to(dtype)
    module = nn.ParameterDict({"w": nn.Parameter(values.clone())})
    parts = [nn.Parameter(values[:2].clone()), nn.Parameter(values[2:].clone())]
    options = {"lr": LR, "foreach": foreach, "eps": 1e-3}  # which float16 has
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=OWN, **options)
    apply_decay_rules(optimizer, module, {"top": {"params": "w", "rows": ":2", "weight_decay": 0.5}, "*": 0.1})
    groups = [{"params": [part], "weight_decay": decay} for part, decay in zip(parts, (0.5, 0.1))]
    hand = torch.optim.AdamW(groups, **options)
    for _ in range(4):
        module["w"].grad = torch.sin(module["w"].detach().float()).to(dtype)
        for part in parts:
            part.grad = torch.sin(part.detach().float()).to(dtype)
        optimizer.step()
        hand.step()
        assert torch.equal(module["w"], torch.cat(parts))


def test_optional_rules_for_parts_fit_any_tensor():
    module = nn.ParameterDict({"scalar": nn.Parameter(torch.tensor(1.0)), "w": nn.Parameter(torch.ones(3, 3))})
    rules = [
        DecayRule(0.1, rows=":2", dim=1, optional=True, group="left"),
        DecayRule(0.2, rows=":1", optional=True, group="top"),
        DecayRule(0.3, group="rest"),
    ]
    groups = build_decay_groups(module, rules)
    assert [(group.name, group.numel) for group in groups] == [("left", 6), ("rest", 4)]


def test_explain_names_the_rules_that_took_some():
    text = build_decay_groups(net(), INSIDE).explain("0.weight")
    assert text.splitlines()[-1] == "  rule 6 '*' takes nothing of it"
    assert build_decay_groups(net(), INSIDE).explain("2.weight").endswith("rule 6 '*' takes what is left of it")


def test_compare_counts_elements():
    model = nn.Linear(9, 6, bias=False)
    rows = {"a": {"params": "weight", "rows": ":2", "weight_decay": 0.1}, "*": 0.0}
    columns = {"a": {"params": "weight", "rows": ":4", "dim": 1, "weight_decay": 0.1}, "*": 0.0}
    assert [move.numel for move in compare(model, rows, columns).moves] == [2 * 5, 4 * 4]
    other = {"a": {"params": "weight", "rows": "1:4", "weight_decay": 0.1}, "*": 0.0}
    found = compare(model, rows, other)
    assert [move.numel for move in found.moves] == [9, 18]
    assert "weight rows 0" in str(found)


def test_many_scattered_rows_are_resolved_in_proportion():
    size = 60_000
    table = nn.Embedding(size, 1)
    rules = {
        "even": {"params": "weight", "rows": "::2", "weight_decay": 0.1},
        "odd": {"params": "weight", "rows": "1::2", "weight_decay": 0.2},
    }
    assert [group.numel for group in build_decay_groups(table, rules)] == [size // 2, size // 2]


def test_two_rules_may_share_a_group():
    rules = [
        DecayRule(0.2, params="0.weight", rows="0:2", group="ends"),
        DecayRule(0.2, params="0.weight", rows=[8], group="ends"),
        DecayRule(DecaySchedule("constant", 0.1), group="rest"),
    ]
    groups = build_decay_groups(net(), rules)
    assert [(group.name, group.numel) for group in groups] == [("ends", 18), ("rest", 36 + 9 + 60 + 21)]
