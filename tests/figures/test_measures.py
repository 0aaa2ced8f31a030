"""The figures of a step: by their definitions in float64, in every kind of loop, and free where nobody asks."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from helpers import LitBase, LitHparams, trainer
from torch import nn

from lightning_regdecay import WeightDecayMonitor, WeightDecayRules, apply_decay_rules, groups_in_force
from lightning_regdecay.figures import steps
from lightning_regdecay.figures.measures import FIGURES, Measured, angle, chosen, figure

RULES = {"*.bias": 0.0, "head.*": 0.5, "*": 0.1}


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def recording(base):
    """An optimizer that notes what each of its steps did to every parameter, with the gradients that it went by."""

    class Recording(base):
        seen = None

        def step(self, closure=None):
            with torch.enable_grad():
                loss = None if closure is None else closure()
            params = [p for group in self.param_groups for p in group["params"]]
            before = {p: p.detach().clone() for p in params}
            gradients = {p: p.grad.detach().clone() for p in params if p.grad is not None}
            rates = {p: group["lr"] * group["weight_decay"] for group in self.param_groups for p in group["params"]}
            super().step()
            self.seen = before, gradients, {p: p.detach().clone() for p in params}, rates
            return loss

    return Recording


AdamW, SGD = recording(torch.optim.AdamW), recording(torch.optim.SGD)


def truth(optimizer, params):
    before, gradients, after, rates = optimizer.seen
    old, new, gradient = (flat([of[p] for p in params]) for of in (before, after, gradients))
    [rate] = {rates[p] for p in params}
    return {
        "l2_norm": new.norm().item(),
        "rms": (new.norm() / math.sqrt(new.numel())).item(),
        "grad_norm": gradient.norm().item(),
        "update_ratio": ((new - old).norm() / old.norm()).item(),
        "decay_share": (rate * old.norm() / (new - old).norm()).item(),
        "angle": torch.acos((torch.dot(old, new) / old.norm() / new.norm()).clamp(max=1)).item(),
        "largest": max((after[p].double().norm() / math.sqrt(p.numel())).item() for p in params),
    }


class Ruled(LitHparams):
    decay_rules = RULES

    def build_optimizer(self, param_groups):
        return AdamW(param_groups, lr=1e-2)

    def build_lr_scheduler(self, optimizer):
        return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), "interval": "step"}


class Theirs(LitBase):
    build = AdamW

    def configure_optimizers(self):
        return type(self).build(self.parameters(), lr=1e-2, weight_decay=0.1)


class Manual(Theirs):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()


class Checking(WeightDecayMonitor):
    """Holds every event against the truth."""

    def _metrics(self, run):
        found = super()._metrics(run)
        for optimizer in run.optimizers:
            if getattr(optimizer, "seen", None) is None:
                continue
            for group in groups_in_force(optimizer):
                expected = truth(optimizer, group["params"])
                for name, value in expected.items():
                    key = f"decay/{group['name']}/{name}"
                    if key in found:
                        least = math.sqrt(2e-7 * expected["update_ratio"]) if name == "angle" else 0.0
                        assert found[key] == pytest.approx(value, rel=1e-5, abs=least), key
        self.events = [*getattr(self, "events", []), set(found)]
        return found


def keys_of(event):
    return {key.rpartition("/")[2] for key in event}


STEP = {"grad_norm", "update_ratio", "decay_share", "angle"}
LOOPS = {
    "own": (Ruled, {}, {}),
    "their optimizer": (Theirs, {}, {"callbacks": [WeightDecayRules(RULES)]}),
    "without rules": (Theirs, {}, {}),
    "every two steps": (Ruled, {"every_n_steps": 2}, {}),
    "clipping": (Ruled, {}, {"gradient_clip_val": 1e-2}),
    "accumulation": (Ruled, {"every_n_steps": 1}, {"accumulate_grad_batches": 3}),
    "manual, two steps a batch": (Manual, {"every_n_steps": 2}, {}),
    "true bfloat16": (Ruled, {}, {"precision": "bf16-true"}),
    "max_steps": (Ruled, {}, {"max_steps": 3}),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_are_those_of_the_definitions(loop):
    kind, of_monitor, of_trainer = LOOPS[loop]
    monitor = Checking(figures="all", **of_monitor)
    callbacks = [*of_trainer.get("callbacks", []), monitor]
    trainer(**{"max_epochs": 2, **of_trainer, "callbacks": callbacks}).fit(kind())
    assert monitor.events
    for event in monitor.events:
        assert keys_of(event) >= STEP | {"l2_norm", "rms", "largest", "equilibrium", "equilibrium_angle"}


def test_figures_of_rates():
    monitor = WeightDecayMonitor(figures="all")
    run = trainer(max_epochs=1, callbacks=[monitor])
    run.fit(Ruled())
    [record], lr = monitor.history, 1e-2 * 0.9**4
    rate = lr * 0.5
    assert record["decay/head/decay_per_step"] == pytest.approx(rate)
    assert record["decay/head/half_life"] == pytest.approx(math.log(2) / rate)
    rms = record["decay/head/rms"]
    assert record["decay/head/equilibrium"] == pytest.approx(rms / math.sqrt(lr / (2 * 0.5)))
    assert record["decay/head/equilibrium_angle"] == pytest.approx(math.sqrt(2 * rate * 0.1 / 1.9))
    # Nothing decays there.
    assert {"decay_per_step", "half_life", "equilibrium"} & {k.rpartition("/")[2] for k in record if "/bias/" in k} == {
        "decay_per_step"
    }
    assert monitor.largest.keys() == {"bias", "head", "rest"}
    assert monitor.largest["rest"] == "norm.weight"
    assert all(math.isfinite(value) for value in record.values())
    assert str(monitor.table).splitlines()[0].split()[-1] == "largest"


def test_what_does_not_apply_is_left_out_and_said_once(caplog):
    class Coupled(Theirs):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)

    monitor = WeightDecayMonitor(figures="all")
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer(max_epochs=2, callbacks=[monitor]).fit(Coupled())
    assert {"grad_norm", "update_ratio", "angle"} <= keys_of(monitor.history[-1])
    without = ["half_life", "equilibrium", "decay_share", "equilibrium_angle"]
    assert not keys_of(monitor.history[-1]).intersection(without)
    lines = [line for line in caplog.messages if "is left out" in line]
    assert [line.partition(" ")[0] for line in lines] == without
    assert all("coupled" in line for line in lines)


@pytest.mark.parametrize("kind", [Ruled, Theirs, Manual])
def test_training_is_not_changed_by_looking_on(kind):
    found = []
    for callbacks in ([WeightDecayMonitor(figures="all", every_n_steps=1)], []):
        model = kind()
        trainer(max_epochs=2, callbacks=callbacks).fit(model)
        found.append([parameter.detach() for parameter in model.parameters()])
    assert all(map(torch.equal, *found))


def test_only_steps_that_are_logged_are_looked_at(monkeypatch):
    looks = []
    measure = steps.local_sums
    monkeypatch.setattr(steps, "local_sums", lambda *args: looks.append(1) or measure(*args))
    monitor = WeightDecayMonitor(every_n_steps=3, figures=["grad_norm"])
    trainer(max_epochs=2, callbacks=[monitor]).fit(Ruled())
    assert [record["step"] for record in monitor.history] == [3, 4, 6, 8]
    assert len(looks) == 4


def test_nothing_hangs_on_where_nothing_of_a_step_is_asked_for():
    seen = []

    class Looking(Theirs):
        def on_train_batch_start(self, *args):
            seen.append("step" in vars(self.trainer.optimizers[0]))

    for figures in (None, ["rms", "half_life", "equilibrium", "largest"], ["grad_norm"]):
        trainer(max_epochs=1, callbacks=[WeightDecayMonitor(figures=figures)]).fit(Looking())
    assert seen == [False] * 8 + [True] * 4


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_when_a_fit_has_ended(fails):
    class Model(Theirs):
        def on_train_batch_start(self, batch, batch_idx):
            if fails and batch_idx == 2:
                raise FloatingPointError

    monitor, model = WeightDecayMonitor(figures="all", every_n_steps=1), Model()
    run = trainer(max_epochs=1, callbacks=[monitor])
    if fails:
        with pytest.raises(FloatingPointError):
            run.fit(model)
    else:
        run.fit(model)
    [optimizer] = run.optimizers
    assert "step" not in vars(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert monitor._measurer._watcher is None
    reference = weakref.ref(model)
    del run, model, optimizer
    gc.collect()
    assert reference() is None or fails  # an exception holds its frames


def test_rules_of_the_user_stay_when_the_watch_ends():
    model = Theirs()
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    apply_decay_rules(optimizer, model, RULES)
    model.configure_optimizers = lambda: optimizer
    trainer(max_epochs=1, callbacks=[WeightDecayMonitor(figures=["angle"])]).fit(model)
    assert members_in_force(optimizer) == {"rest", "bias", "head"}


def members_in_force(optimizer):
    return {group["name"] for group in groups_in_force(optimizer)}


def test_several_optimizers():
    class Two(LitBase):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return AdamW(self.body.parameters(), lr=1e-2), SGD(
                [*self.norm.parameters(), *self.head.parameters()], lr=0.1
            )

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

    monitor = WeightDecayMonitor(figures=["grad_norm", "update_ratio"], every_n_steps=2)
    run = trainer(max_epochs=1, callbacks=[monitor])
    run.fit(Two())
    record = monitor.history[-1]
    for optimizer, name in zip(run.optimizers, ("Recording", "Recording_2"), strict=True):
        [group] = optimizer.param_groups
        expected = truth(optimizer, group["params"])
        for one in ("grad_norm", "update_ratio"):
            assert record[f"decay/{name}/0/{one}"] == pytest.approx(expected[one], rel=1e-5)


class TestChoice:
    def test_the_first_three_by_default(self):
        assert chosen(None) == ("l2_norm", "penalty", "weight_decay")
        assert chosen("all") == tuple(FIGURES)
        assert chosen("rms") == ("rms",)
        assert chosen(["rms", "angle", "rms"]) == ("rms", "angle")

    @pytest.mark.parametrize(
        ("figures", "error", "message"),
        [
            ("rmse", ValueError, "unknown figure 'rmse'; did you mean 'rms'"),
            (["l2"], ValueError, "unknown figure 'l2'"),
            ([], ValueError, "figures is empty"),
            (5, TypeError, "figures must be names of figures"),
            ([5], TypeError, "figures must be names of figures"),
            ({"rms": True}, TypeError, "figures must be names of figures"),
        ],
    )
    def test_mistakes_are_told(self, figures, error, message):
        with pytest.raises(error, match=message):
            WeightDecayMonitor(figures=figures)

    def test_only_what_is_asked_for_is_logged(self):
        monitor = WeightDecayMonitor(figures=["rms"])
        trainer(max_epochs=1, callbacks=[monitor]).fit(Ruled())
        assert keys_of(monitor.history[0]) == {"epoch", "step", "rms"}
        assert "total" not in str(monitor.table)


class TestDefinitions:
    @pytest.mark.parametrize("theta", [1e-6, 1e-4, 1e-2, 1.0, 3.0])
    @pytest.mark.parametrize("ratio", [1.0, 0.999, 0.5, 2.0])
    def test_an_angle_is_that_between_vectors(self, theta, ratio):
        update = math.sqrt((1 - ratio) ** 2 + 4 * ratio * math.sin(theta / 2) ** 2)
        assert angle(1.0, ratio, update) == pytest.approx(theta, rel=1e-4)

    def test_without_a_value(self):
        nothing = Measured(0.0, 0, 0.0, lr=0.1, is_decoupled=True, is_adam_like=True, before=0.0, update=0.0, beta=0.9)
        without = {name for name in FIGURES if figure(name, nothing) is None}
        assert without == {
            *("half_life", "equilibrium", "equilibrium_angle", "grad_norm", "update_ratio"),
            *("decay_share", "angle", "largest", "distance"),
        }
        assert figure("rms", nothing) == 0.0

    def test_without_lr(self):
        assert figure("half_life", Measured(1.0, 4, 0.1)) == "the optimizer has no lr"


def test_norms_come_to_rest_at_the_equilibrium():
    """Of Adam-like decoupled optimizers on noise, as the source has it; the expected angle likewise."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    lr, decay = 5e-3, 1.0
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=decay)
    angles = []
    for step in range(2000):
        layer.weight.grad = torch.randn(64, 64)
        before = layer.weight.detach().clone()
        optimizer.step()
        if step >= 1500:
            update = (layer.weight.detach() - before).norm().item()
            angles.append(angle(before.norm().item(), layer.weight.detach().norm().item(), update))
    of = Measured(
        layer.weight.norm().item(), 4096, decay, lr=lr, is_decoupled=True, is_adam_like=True, beta=0.9, before=1.0
    )
    assert figure("equilibrium", of) == pytest.approx(1.0, abs=0.03)
    assert sum(angles) / len(angles) == pytest.approx(figure("equilibrium_angle", of), rel=0.05)


class TestLoops:
    """Where steps are not one in each batch."""

    def test_two_monitors_have_figures_of_their_own(self):
        first = WeightDecayMonitor(prefix="a", figures=["grad_norm"])
        second = WeightDecayMonitor(prefix="b", figures=["update_ratio"], every_n_steps=1)
        trainer(max_epochs=1, callbacks=[first, second]).fit(Ruled())
        assert keys_of(first.history[-1]) >= {"grad_norm"}
        assert all("update_ratio" in keys_of(record) for record in second.history)

    def test_optimizers_that_step_in_turn(self):
        class Turns(LitBase):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def configure_optimizers(self):
                return AdamW(self.body.parameters(), lr=1e-2), AdamW(self.head.parameters(), lr=1e-2)

            def training_step(self, batch, batch_idx):
                body, head = self.optimizers()
                for optimizer in [body, head] if batch_idx % 2 == 0 else [body]:
                    optimizer.zero_grad()
                    self.manual_backward(super().training_step(batch, batch_idx))
                    optimizer.step()

        monitor = WeightDecayMonitor(figures=["update_ratio"])
        run = trainer(max_epochs=2, callbacks=[monitor], limit_train_batches=3)
        run.fit(Turns())
        assert keys_of(monitor.history[-1]) >= {"update_ratio"}
        expected = truth(run.optimizers[1], list(run.lightning_module.head.parameters()))["update_ratio"]
        assert monitor.history[-1]["decay/Recording_2/0/update_ratio"] == pytest.approx(expected, rel=1e-5)

    def test_an_optimizer_that_moves_weights_before_its_closure(self):
        from helpers import SAM

        class Lit(LitBase):
            def configure_optimizers(self):
                return SAM(self.parameters(), torch.optim.AdamW, rho=0.5, lr=1e-2, weight_decay=0.1)

            def on_train_batch_start(self, *args):
                self.before = flat(self.parameters())

        monitor, model = WeightDecayMonitor(figures=["update_ratio"]), Lit()
        trainer(max_epochs=1, callbacks=[monitor]).fit(model)
        expected = (flat(model.parameters()) - model.before).norm() / model.before.norm()
        assert monitor.history[-1]["decay/0/update_ratio"] == pytest.approx(expected.item(), rel=1e-4)

    def test_checkpoints_of_a_validation_within_an_epoch_find_them(self, tmp_path):
        from lightning.pytorch.callbacks import ModelCheckpoint

        class Validated(Ruled):
            def val_dataloader(self):
                return self.train_dataloader()

        monitor = WeightDecayMonitor(figures=["angle"])
        saving = ModelCheckpoint(tmp_path, monitor="decay/rest/angle")
        options = {"val_check_interval": 2, "enable_checkpointing": True}
        trainer(max_epochs=1, callbacks=[monitor, saving], **options).fit(Validated())
        assert saving.best_model_score is not None

    def test_an_optimizer_that_takes_the_place_of_another(self):
        class Swapped(Theirs):
            def on_train_epoch_start(self):
                if self.current_epoch == 1:
                    self.trainer.optimizers = [AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)]

        monitor = WeightDecayMonitor(figures=["angle"])
        trainer(max_epochs=2, callbacks=[monitor]).fit(Swapped())
        assert all("angle" in keys_of(record) for record in monitor.history)

    def test_a_compiled_step(self):
        class Compiled(Theirs):
            build = torch.optim.AdamW

            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                optimizer.step = torch.compile(optimizer.step, backend="eager")
                return optimizer

        monitor = WeightDecayMonitor(figures=["grad_norm", "angle"])
        trainer(max_epochs=1, callbacks=[monitor]).fit(Compiled())
        assert {"grad_norm", "angle"} <= keys_of(monitor.history[-1])

    def test_numbers_that_an_optimizer_draws_are_those_of_the_training(self):
        class Noisy(torch.optim.Optimizer):
            def __init__(self, params, lr=0.01, weight_decay=0.1):
                super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

            @torch.no_grad()
            def step(self, closure=None):
                with torch.enable_grad():
                    loss = None if closure is None else closure()
                for group in self.param_groups:
                    for p in group["params"]:
                        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(p.grad + torch.randn_like(p), alpha=-0.01)
                return loss

        found = []
        for figures in (None, "all"):
            torch.manual_seed(0)
            model = Theirs()
            model.configure_optimizers = lambda model=model: Noisy(model.parameters())
            torch.manual_seed(1)
            trainer(max_epochs=1, callbacks=[WeightDecayMonitor(figures=figures)]).fit(model)
            found.append([parameter.detach() for parameter in model.parameters()])
        assert all(map(torch.equal, *found))

    def test_an_lr_below_zero_ends_no_training(self):
        class Lit(Ruled):
            def build_lr_scheduler(self, optimizer):
                return {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step)}

        trainer(max_epochs=3, callbacks=[WeightDecayMonitor(figures="all")]).fit(Lit())

    def test_a_figure_without_a_single_value_is_named(self):
        class Never(Manual):
            def training_step(self, batch, batch_idx):
                if self.trainer.is_last_batch:
                    return
                super().training_step(batch, batch_idx)

        with pytest.warns(UserWarning, match="no step was logged that angle could be taken of"):
            trainer(max_epochs=1, callbacks=[WeightDecayMonitor(figures=["angle"])]).fit(Never())


def test_generators_of_names():
    assert WeightDecayMonitor(figures=(name for name in ["rms"])).figures == ("rms",)
    assert WeightDecayMonitor(prog_bar={"a/b": 1}.keys()).prog_bar == ("a/b",)


def test_tensors_without_names_in_their_groups_are_named():
    monitor = WeightDecayMonitor(figures=["largest"])
    trainer(max_epochs=1, callbacks=[monitor]).fit(Theirs())
    assert monitor.largest == {"0": "norm.weight"}


def test_what_has_no_value_any_more_is_monitored_no_more():
    class Lit(Ruled):
        decay_rules = {"*": {"schedule": "linear", "start": 0.1, "end": 0.0, "epochs": 1}}

    run = trainer(max_epochs=2, callbacks=[WeightDecayMonitor(figures=["rms", "half_life"])])
    run.fit(Lit())
    assert "decay/rest/half_life" not in run.callback_metrics
    assert "decay/rest/rms" in run.callback_metrics
