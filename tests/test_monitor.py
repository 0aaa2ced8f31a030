"""The monitor: right figures, in the right places, at the right moments."""

from __future__ import annotations

import csv
import math
import sys

import lightning
import pytest
import torch
from helpers import LitBase, LitRules, digits_loader, float64_norm, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_regdecay import WeightDecayMonitor, build_decay_groups

GROUPS = {"bias": 0.0, "norm": 0.01, "head": 1e-3, "rest": 0.05}
KEYS = {f"decay/{g}/{f}" for g in GROUPS for f in ("l2_norm", "penalty", "weight_decay")} | {"decay/total/penalty"}


def expected_figures(optimizer):
    """From the definition, in float64."""
    figures = {}
    for group in optimizer.param_groups:
        norm, decay = float64_norm(group["params"]), group["weight_decay"]
        figures[f"decay/{group['name']}/l2_norm"] = norm
        figures[f"decay/{group['name']}/penalty"] = 0.5 * decay * norm**2
        figures[f"decay/{group['name']}/weight_decay"] = decay
    figures["decay/total/penalty"] = sum(v for k, v in figures.items() if k.endswith("penalty"))
    return figures


class ByHand(LitBase):
    """Without the mixin: groups without names, several optimizers, manual or automatic optimization."""

    def __init__(self, *optimizers, manual=False):
        super().__init__()
        self.make = optimizers
        self.automatic_optimization = not manual

    def configure_optimizers(self):
        parts = [self.body, self.head, self.norm]
        return [make(part.parameters()) for make, part in zip(self.make, parts)]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss


class TestFigures:
    def test_are_those_of_the_definition_at_the_end_of_every_epoch(self):
        class Reference(Callback):
            def __init__(self):
                self.figures = []

            def on_train_epoch_end(self, trainer, pl_module):
                self.figures.append(expected_figures(trainer.optimizers[0]))

        monitor, reference = WeightDecayMonitor(), Reference()
        run = trainer(max_epochs=3, callbacks=[monitor, reference])
        run.fit(LitRules())
        assert [(record["epoch"], record["step"]) for record in monitor.history] == [(0, 4), (1, 8), (2, 12)]
        for record, figures in zip(monitor.history, reference.figures):
            assert {key: record[key] for key in figures} == pytest.approx(figures, rel=1e-6)
            assert set(record) == KEYS | {"epoch", "step"}
        assert {key: value.item() for key, value in run.callback_metrics.items() if key in KEYS} == pytest.approx(
            reference.figures[-1], rel=1e-6
        )
        assert run.callback_metrics.keys() >= KEYS

    def test_weight_decay_is_the_live_one(self):
        class Doubling(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                for group in trainer.optimizers[0].param_groups:
                    group["weight_decay"] *= 2

        monitor = WeightDecayMonitor()
        trainer(max_epochs=3, callbacks=[monitor, Doubling()]).fit(LitRules())
        assert [record["decay/rest/weight_decay"] for record in monitor.history] == [0.1, 0.2, 0.4]
        last = monitor.history[-1]
        assert last["decay/rest/penalty"] == pytest.approx(0.5 * 0.4 * last["decay/rest/l2_norm"] ** 2)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_and_infinity_are_logged_with_one_warning_that_names_the_group(self, value):
        class Breaking(LitRules):
            def training_step(self, batch, batch_idx):
                self.head.weight.data[0, 0] = value
                return self.body(batch[0]).sum()

        monitor = WeightDecayMonitor(every_n_steps=1)
        with pytest.warns(UserWarning, match="the L2 norm of group 'head' is") as caught:
            trainer(max_epochs=2, callbacks=[monitor]).fit(Breaking())
        assert sum("L2 norm of group" in str(w.message) for w in caught) == 1
        with pytest.warns(UserWarning, match="the L2 norm of group 'head' is"):  # a new run warns anew
            trainer(callbacks=[monitor]).fit(Breaking())
        assert all(str(record["decay/head/l2_norm"]) == str(value) for record in monitor.history)
        assert all(math.isfinite(record["decay/rest/penalty"]) for record in monitor.history)

    def test_no_decay_is_no_penalty_even_where_the_norm_is_infinite(self):
        class Breaking(LitRules):
            decay_rules = {"head.*": 0.0, "*": 0.1}

            def training_step(self, batch, batch_idx):
                self.head.weight.data[0, 0] = math.inf
                return self.body(batch[0]).sum()

        monitor = WeightDecayMonitor()
        with pytest.warns(UserWarning, match="'head' is inf"):
            trainer(callbacks=[monitor]).fit(Breaking())
        assert monitor.history[-1]["decay/head/penalty"] == 0.0
        assert math.isfinite(monitor.history[-1]["decay/total/penalty"])


class TestMoments:
    def steps(self, every_n_steps=None, model=None, **options):
        monitor = WeightDecayMonitor(every_n_steps)
        trainer(callbacks=[monitor], **options).fit(model or LitRules())
        return [record["step"] for record in monitor.history]

    def test_epochs(self):
        assert self.steps(max_epochs=2) == [4, 8]

    def test_steps_and_epochs_each_moment_once(self):
        assert self.steps(3, max_epochs=2) == [3, 4, 6, 8]
        assert self.steps(4, max_epochs=2) == [4, 8]
        assert self.steps(100, max_epochs=2) == [4, 8]

    def test_as_often_as_the_trainer_logs(self):
        assert self.steps("log_every_n_steps", max_epochs=2, log_every_n_steps=3) == [3, 4, 6, 8]
        assert self.steps("log_every_n_steps", max_epochs=2, log_every_n_steps=0) == [4, 8]

    def test_gradient_accumulation(self):
        assert self.steps(1, max_epochs=2, accumulate_grad_batches=3) == [1, 2, 3, 4]
        assert self.steps(2, max_epochs=2, accumulate_grad_batches=2) == [2, 4]

    def test_manual_optimization_with_several_steps_a_batch(self):
        def sgd(params):
            return torch.optim.SGD(params, lr=0.1)

        assert self.steps(3, model=ByHand(sgd, sgd, manual=True), max_epochs=1) == [4, 6, 8]

    def test_limits_and_early_ends(self):
        assert self.steps(max_epochs=2, limit_train_batches=2) == [2, 4]
        assert self.steps(max_epochs=-1, max_steps=6) == [4, 6]
        assert self.steps(fast_dev_run=True) == [1]
        assert self.steps(2, fast_dev_run=3) == [2, 3]

        class Skipping(LitRules):
            def on_train_batch_start(self, batch, batch_idx):
                return -1 if batch_idx == 2 else None

        assert self.steps(model=Skipping(), max_epochs=2) == [2, 4]

    def test_an_iterable_dataset_of_unknown_length(self):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(digits_loader().dataset)

        model = LitRules()
        model.train_dataloader = lambda: torch.utils.data.DataLoader(Stream(), batch_size=64)
        assert self.steps(model=model, max_epochs=2) == [4, 8]

    def test_fit_called_again(self):
        monitor = WeightDecayMonitor()
        run = trainer(max_epochs=1, callbacks=[monitor])
        model = LitRules()
        run.fit(model)
        run.fit_loop.max_epochs = 2
        run.fit(model)
        assert [record["step"] for record in monitor.history] == [4, 8]
        trainer(max_epochs=1, callbacks=[monitor]).fit(LitRules())  # another run, from its step 0
        assert [record["step"] for record in monitor.history] == [4]

    def test_the_figures_of_the_epoch_are_there_for_validation(self):
        seen = []

        class Lit(LitRules):
            def on_validation_epoch_end(self):
                if not self.trainer.sanity_checking:
                    truth = float64_norm([self.head.weight])
                    assert self.trainer.callback_metrics["decay/head/l2_norm"].item() == pytest.approx(truth, rel=1e-6)
                    seen.append(self.trainer.global_step)

        trainer(max_epochs=2, callbacks=[WeightDecayMonitor()], val_check_interval=2).fit(
            Lit(), val_dataloaders=digits_loader(64)
        )
        assert seen == [2, 4, 6, 8]

    def test_no_record_of_sanity_checks_or_validation_alone(self):
        class Sanity(Callback):
            def on_sanity_check_end(self, trainer, pl_module):
                assert not KEYS & trainer.callback_metrics.keys()

        monitor = WeightDecayMonitor()
        run = trainer(callbacks=[monitor, Sanity()])
        model = LitRules()
        run.fit(model, val_dataloaders=digits_loader(64))
        assert run.callback_metrics.keys() >= KEYS
        run.validate(model, digits_loader(64), verbose=False)
        assert not KEYS & run.callback_metrics.keys()
        assert len(monitor.history) == 1

    def test_an_epoch_without_a_batch_leaves_no_record(self):
        class Never(LitRules):
            def on_train_batch_start(self, batch, batch_idx):
                return -1

        assert self.steps(model=Never(), max_epochs=1) == []

    def test_steps_after_resuming(self, tmp_path):
        first = trainer(max_epochs=2, callbacks=[WeightDecayMonitor(5)])
        first.fit(LitRules())
        first.save_checkpoint(tmp_path / "two.ckpt")
        resumed, straight = WeightDecayMonitor(5), WeightDecayMonitor(5)
        trainer(max_epochs=4, callbacks=[resumed]).fit(LitRules(), ckpt_path=tmp_path / "two.ckpt")
        trainer(max_epochs=4, callbacks=[straight]).fit(LitRules())
        assert [record["step"] for record in straight.history] == [4, 5, 8, 10, 12, 15, 16]
        assert resumed.history == straight.history


class TestPlaces:
    def test_checkpoints_and_early_stopping_can_monitor(self, tmp_path):
        checkpoint = ModelCheckpoint(tmp_path, monitor="decay/total/penalty", filename="{epoch}", save_top_k=1)
        stop = EarlyStopping("decay/rest/l2_norm", patience=1, mode="min", check_on_train_epoch_end=True, min_delta=100)
        run = trainer(max_epochs=9, callbacks=[stop, checkpoint, WeightDecayMonitor()], enable_checkpointing=True)
        run.fit(LitRules())
        assert run.current_epoch == 2
        assert checkpoint.best_model_score is not None

    def test_checkpoints_on_validation_too(self, tmp_path):
        checkpoint = ModelCheckpoint(tmp_path, monitor="decay/head/l2_norm", save_top_k=-1)
        monitor = WeightDecayMonitor()
        trainer(max_epochs=2, callbacks=[checkpoint, monitor], enable_checkpointing=True).fit(
            LitRules(), val_dataloaders=digits_loader(64)
        )
        scores = [score.item() for score in checkpoint.best_k_models.values()]
        assert scores == pytest.approx([record["decay/head/l2_norm"] for record in monitor.history], rel=1e-6)

    def test_the_progress_bar_on_request(self):
        run = trainer(callbacks=[WeightDecayMonitor(prog_bar=True)])
        run.fit(LitRules())
        assert run.progress_bar_metrics.keys() >= KEYS
        run = trainer(callbacks=[WeightDecayMonitor()])
        run.fit(LitRules())
        assert not KEYS & run.progress_bar_metrics.keys()

    def test_the_prefix(self):
        run = trainer(callbacks=[WeightDecayMonitor(prefix="train/wd")])
        run.fit(LitRules())
        assert "train/wd/total/penalty" in run.callback_metrics

    def logged_steps(self, path, model, every_n_steps=None, **options):
        """The steps under which the loss and the norms stand in the logger's file."""
        logger = CSVLogger(path)
        trainer(callbacks=[WeightDecayMonitor(every_n_steps)], logger=logger, log_every_n_steps=1, **options).fit(model)
        with open(logger.experiment.metrics_file_path) as file:
            rows = list(csv.DictReader(file))
        losses = [int(row["step"]) for row in rows if row["train_loss"]]
        return losses, [int(row["step"]) for row in rows if row["decay/total/penalty"]]

    def test_the_axis_is_that_of_what_training_logs(self, tmp_path):
        losses, norms = self.logged_steps(tmp_path, LitRules(), 2, max_epochs=2)
        assert losses == list(range(8))
        assert norms == [1, 3, 5, 7]

    def test_the_axis_of_batches_with_several_steps(self, tmp_path):
        def sgd(params):
            return torch.optim.SGD(params, lr=0.1)

        losses, norms = self.logged_steps(tmp_path, ByHand(sgd, sgd, manual=True), 2)
        assert losses == norms == [0, 1, 2, 3]

    def test_the_axis_of_an_epoch_that_ends_early(self, tmp_path):
        losses, norms = self.logged_steps(tmp_path, LitRules(), max_epochs=-1, max_steps=6)
        assert losses == [0, 1, 2, 3, 4, 5]
        assert norms == [3, 5]

    def test_what_was_logged_is_in_the_trainer(self, tmp_path):
        run = trainer(callbacks=[WeightDecayMonitor()], logger=CSVLogger(tmp_path))
        run.fit(LitRules())
        assert run.logged_metrics.keys() >= KEYS


class TestGroupsOfAnyOptimizer:
    def figures(self, model, **options):
        monitor = WeightDecayMonitor()
        trainer(callbacks=[monitor], **options).fit(model)
        return monitor.history[-1]

    def test_groups_without_names_go_by_number(self):
        model = ByHand(lambda p: torch.optim.SGD([{"params": [q]} for q in p], lr=0.1, weight_decay=0.1))
        record = self.figures(model)
        assert record["decay/0/l2_norm"] == pytest.approx(float64_norm([model.body.weight]), rel=1e-6)
        assert record["decay/1/l2_norm"] == pytest.approx(float64_norm([model.body.bias]), rel=1e-6)

    def test_several_optimizers_go_by_their_names(self):
        def adam(params):
            return torch.optim.Adam(params, weight_decay=0.1)

        model = ByHand(adam, adam, lambda p: torch.optim.SGD(p, lr=0.1), manual=True)
        record = self.figures(model)
        assert {key.removesuffix("/l2_norm") for key in record if key.endswith("l2_norm")} == {
            "decay/Adam/0",
            "decay/Adam_2/0",
            "decay/SGD/0",
        }
        assert record["decay/Adam_2/0/l2_norm"] == pytest.approx(float64_norm(model.head.parameters()), rel=1e-6)
        assert record["decay/total/penalty"] == pytest.approx(
            record["decay/Adam/0/penalty"] + record["decay/Adam_2/0/penalty"]
        )

    def test_names_that_clash_or_that_loggers_refuse(self):
        names = iter(["total", "a b", "a*b"])
        model = ByHand(
            lambda p: torch.optim.SGD([{"params": [q], "name": next(names)} for q in p], lr=0.1),
        )
        assert {key for key in self.figures(model) if key.endswith("l2_norm")} == {
            "decay/total_2/l2_norm",
            "decay/a_b/l2_norm",
        }

    def test_names_that_are_those_of_other_parameters(self):
        class Two(LitBase):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.full((3,), 100.0))  # and build_decay_groups(self.head) has a `weight`

            def configure_optimizers(self):
                groups = build_decay_groups(self.head, {"weight": 0.1, "*": 0.0})
                return torch.optim.SGD([group.as_param_group() for group in groups], lr=0.1)

        model = Two()
        record = self.figures(model)
        assert record["decay/weight/l2_norm"] == pytest.approx(float64_norm([model.head.weight]), rel=1e-6)

    def test_an_optimizer_without_weight_decay_has_no_penalty(self):
        record = self.figures(ByHand(torch.optim.Rprop))
        assert record["decay/0/weight_decay"] == record["decay/0/penalty"] == 0.0
        assert record["decay/0/l2_norm"] > 0

    def test_groups_added_while_training(self):
        class Adding(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                if trainer.current_epoch == 1:
                    trainer.optimizers[0].add_param_group({"params": pl_module.head.parameters()})

        monitor = WeightDecayMonitor()
        model = ByHand(lambda p: torch.optim.SGD(p, lr=0.1))
        trainer(max_epochs=2, callbacks=[monitor, Adding()]).fit(model)
        assert "decay/1/l2_norm" not in monitor.history[0]
        assert "decay/1/l2_norm" in monitor.history[1]
        figure, _ = monitor.plot()
        assert figure is not None

    @pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true", "bf16-mixed"])
    def test_precisions(self, precision):
        model = LitRules()
        model.optimizer = lambda groups: torch.optim.SGD(groups, lr=0.01)  # AdamW's eps is 0 in float16
        record = self.figures(model, precision=precision)
        assert record["decay/head/l2_norm"] == pytest.approx(float64_norm([model.head.weight]), rel=1e-6)


class TestWrappedSubmodules:
    @pytest.mark.parametrize(
        "wrap",
        [lambda module: torch.compile(module, backend="eager"), checkpoint_wrapper],
        ids=["compile", "checkpoint"],
    )
    def test_change_no_group_and_no_figure(self, wrap):
        class Wrapped(LitRules):
            def configure_model(self):
                self.body = wrap(self.body)

        plain, wrapped = WeightDecayMonitor(), WeightDecayMonitor()
        trainer(max_epochs=2, callbacks=[plain]).fit(LitRules())
        trainer(max_epochs=2, callbacks=[wrapped]).fit(Wrapped())
        assert wrapped.history == plain.history

    def test_a_compiled_model(self):
        class Quiet(LitRules):  # torch 2.13 cannot compile the logging of Lightning 2.6
            def training_step(self, batch, batch_idx):
                return self.training_step_loss(batch)

        plain, compiled = WeightDecayMonitor(), WeightDecayMonitor()
        trainer(max_epochs=2, callbacks=[plain]).fit(Quiet())
        trainer(max_epochs=2, callbacks=[compiled]).fit(torch.compile(Quiet(), backend="eager"))
        assert compiled.history == plain.history


class TestBesideAveragedWeights:
    def test_the_figures_are_those_of_the_weights_in_training(self):
        averaging = getattr(lightning.pytorch.callbacks, "WeightAveraging", None)
        if averaging is None:
            pytest.skip("lightning has no WeightAveraging before 2.6")
        plain, beside = WeightDecayMonitor(), WeightDecayMonitor()
        data = {"val_dataloaders": digits_loader(64)}
        trainer(max_epochs=3, callbacks=[plain]).fit(LitRules(), **data)
        trainer(max_epochs=3, callbacks=[averaging(), beside]).fit(LitRules(), **data)
        assert beside.history == plain.history


class TestSummary:
    def test_table_with_live_values(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        trainer(callbacks=[WeightDecayMonitor()]).fit(LitRules())
        printed = capsys.readouterr().out
        for row in (["bias", "*.bias", "3", "42", "0", "0.001"], ["rest", "*", "1", "1,024", "0.05", "0.001"]):
            assert any(row == [cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines())
        assert "1,242" in printed

    def test_plain_text_without_rich(self, capsys, monkeypatch):
        for name in ("rich", "rich.table"):
            monkeypatch.setitem(sys.modules, name, None)
        trainer(callbacks=[WeightDecayMonitor()]).fit(LitRules())
        lines = capsys.readouterr().out.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("group"))
        assert lines[start].split() == ["group", "rule", "tensors", "parameters", "weight_decay", "lr"]
        assert lines[start + 1].split() == ["bias", "*.bias", "3", "42", "0", "0.001"]

    @pytest.mark.parametrize("rule", ["*[bh]ody*", "re:[/.]bias", "re:[b]ias"])
    def test_rules_that_look_like_markup(self, capsys, monkeypatch, rule):
        class Lit(LitRules):
            decay_rules = {rule: 0.1}

        monkeypatch.setenv("COLUMNS", "120")
        trainer(callbacks=[WeightDecayMonitor()]).fit(Lit())
        assert rule in capsys.readouterr().out

    def test_of_a_resumed_run_it_shows_the_rules_of_today(self, tmp_path, capsys, monkeypatch):
        class Other(LitRules):
            decay_rules = {"*.bias": 0.0, "*norm*": 0.01, "head.*": 1e-3, "*": 0.77}

        monkeypatch.setenv("COLUMNS", "120")
        first = trainer()
        first.fit(LitRules())
        first.save_checkpoint(tmp_path / "x.ckpt")
        trainer(max_epochs=2, callbacks=[WeightDecayMonitor()]).fit(Other(), ckpt_path=tmp_path / "x.ckpt")
        assert "0.77" in capsys.readouterr().out

    def test_of_a_model_that_builds_its_own_groups_it_claims_no_rules(self, capsys, monkeypatch):
        class Own(LitRules):
            decay_rules = None

            def configure_optimizers(self):
                return torch.optim.SGD([{"params": self.parameters(), "name": "bias"}], lr=0.1, weight_decay=0.7)

        monkeypatch.setenv("COLUMNS", "120")
        trainer(callbacks=[WeightDecayMonitor()]).fit(Own())
        printed = [[c.strip() for c in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
        assert ["bias", "-", "6", "1,242", "0.7", "0.1"] in printed

    def test_without_the_mixin(self, capsys):
        trainer(callbacks=[WeightDecayMonitor()]).fit(ByHand(lambda p: torch.optim.SGD(p, lr=0.5, weight_decay=0.25)))
        assert "0.25" in capsys.readouterr().out

    def test_off(self, capsys):
        trainer(callbacks=[WeightDecayMonitor(summary=False)]).fit(LitRules())
        assert "weight_decay" not in capsys.readouterr().out


class TestHistory:
    def test_is_plain_data_kept_through_checkpoints(self, tmp_path):
        monitor = WeightDecayMonitor()
        saving = ModelCheckpoint(tmp_path, save_last=True)
        trainer(max_epochs=2, callbacks=[monitor, saving], enable_checkpointing=True).fit(LitRules())
        stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][monitor.state_key]
        assert stored.keys() == {"history", "seen", "stride", "total", "highest"}
        assert stored["history"] == monitor.history

        resumed = WeightDecayMonitor()
        trainer(max_epochs=4, callbacks=[resumed]).fit(LitRules(), ckpt_path=tmp_path / "last.ckpt")
        straight = WeightDecayMonitor()
        trainer(max_epochs=4, callbacks=[straight]).fit(LitRules())
        assert resumed.history == straight.history
        assert len(straight.history) == 4

    @pytest.mark.parametrize("when", ["validation", "step"])
    def test_resumed_from_within_an_epoch_it_is_whole(self, tmp_path, when):
        options = {"every_n_train_steps": 4} if when == "step" else {"save_on_train_epoch_end": False}
        saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **options)
        data = {"val_dataloaders": digits_loader(64)}
        straight = WeightDecayMonitor()
        trainer(max_epochs=3, callbacks=[straight, saving], enable_checkpointing=True).fit(LitRules(), **data)
        resumed = WeightDecayMonitor()
        trainer(max_epochs=3, callbacks=[resumed]).fit(LitRules(), **data, ckpt_path=tmp_path / "step=4.ckpt")
        assert [record["step"] for record in straight.history] == [4, 8, 12]
        assert resumed.history == straight.history

    @pytest.mark.parametrize("how", ["validate", "test", "predict", "a fit that failed", "a fit that failed later"])
    def test_of_a_checkpoint_that_was_only_looked_at_goes_into_no_fit(self, how, tmp_path):
        class Lit(LitRules):
            def test_step(self, batch, batch_idx):
                pass

            def predict_step(self, batch, batch_idx):
                pass

            def on_fit_start(self):
                if how == "a fit that failed":
                    raise ArithmeticError

            def on_train_start(self):
                if how == "a fit that failed later":
                    raise ArithmeticError

        for name, callbacks, epochs in (("watched", [WeightDecayMonitor()], 2), ("unwatched", [], 1)):
            run = trainer(max_epochs=epochs, callbacks=callbacks)
            run.fit(LitRules())
            run.save_checkpoint(tmp_path / name)
        monitor = WeightDecayMonitor()
        run = trainer(max_epochs=4, callbacks=[monitor])
        if how.startswith("a fit"):
            with pytest.raises(ArithmeticError):
                run.fit(Lit(), ckpt_path=tmp_path / "watched")
        else:
            getattr(run, how)(Lit(), digits_loader(64), ckpt_path=tmp_path / "watched")
        trainer(max_epochs=3, callbacks=[monitor]).fit(LitRules(), ckpt_path=tmp_path / "unwatched")
        assert [record["step"] for record in monitor.history] == [8, 12]

    def test_several_monitors_keep_their_own(self, tmp_path):
        def monitors():
            return [WeightDecayMonitor(prefix="a"), WeightDecayMonitor(every_n_steps=1, prefix="b", summary=False)]

        first = monitors()
        run = trainer(callbacks=first)
        run.fit(LitRules())
        run.save_checkpoint(tmp_path / "x.ckpt")
        again = monitors()
        trainer(max_epochs=1, callbacks=again).fit(LitRules(), ckpt_path=tmp_path / "x.ckpt")
        assert [m.history for m in again] == [m.history for m in first]
        assert [len(m.history) for m in again] == [1, 4]


@pytest.mark.usefixtures("no_window")
class TestPlot:
    @pytest.fixture
    def monitor(self):
        monitor = WeightDecayMonitor(every_n_steps=1)
        trainer(max_epochs=2, callbacks=[monitor]).fit(LitRules())
        return monitor

    def test_shows_the_norm_and_the_penalty_of_each_group(self, monitor):
        figure, axes = monitor.plot()
        assert figure is axes[0].figure
        for ax, name in zip(axes, ("l2_norm", "penalty")):
            lines = {line.get_label(): line for line in ax.get_lines()}
            assert list(lines) == (["total"] if name == "penalty" else []) + list(GROUPS)
            for group in GROUPS:
                assert lines[group].get_xdata().tolist() == [record["step"] for record in monitor.history]
                assert lines[group].get_ydata().tolist() == [
                    record[f"decay/{group}/{name}"] for record in monitor.history
                ]
            assert len({line.get_color() for line in lines.values()}) == len(lines)

    def test_axes_have_names_and_units(self, monitor):
        _, axes = monitor.plot()
        assert axes[1].get_xlabel() == "time (optimizer steps)"
        assert axes[0].get_ylabel() == "L2 norm ‖w‖₂ (unit of the weights)"
        assert axes[1].get_ylabel() == "penalty ½·λ·‖w‖₂² (unit of the loss)"

    def test_one_legend_covers_no_line_and_tells_the_weight_decay(self, monitor):
        figure, axes = monitor.plot()
        figure.canvas.draw()
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [
            "bias (λ 0)",
            "norm (λ 0.01)",
            "head (λ 0.001)",
            "rest (λ 0.05)",
            "total",
        ]
        for ax in axes:
            assert ax.get_legend() is None
            assert not legend.get_window_extent().overlaps(ax.get_window_extent())
        assert figure.bbox.contains(*legend.get_window_extent().max)

    def test_small_groups_are_not_pressed_onto_the_axis(self):
        monitor = WeightDecayMonitor()
        for span, scale in ((10.0, "linear"), (1000.0, "symlog")):
            values = {"a": 1.0, "b": span, "c": 0.0}
            record = {f"decay/{group}/{name}": values[group] for group in values for name in ("l2_norm", "penalty")}
            monitor.history = [{"epoch": 0, "step": step, **record, "decay/total/penalty": span} for step in (1, 2)]
            _, axes = monitor.plot()
            assert [ax.get_yscale() for ax in axes] == [scale, scale]
            assert all(ax.get_ylim()[0] < 0 < span < ax.get_ylim()[1] for ax in axes)

    def test_on_axes_of_the_user(self, monitor):
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2)
        assert monitor.plot(axes)[0] is figure
        assert axes[0].get_legend() is None
        assert len(axes[1].get_legend().get_texts()) == len(GROUPS) + 1
        for wrong in ([axes[0]], axes[0], 3):
            with pytest.raises(ValueError, match="ax must be two axes"):
                monitor.plot(wrong)

    def test_before_anything_was_logged(self):
        with pytest.raises(ValueError, match="nothing to plot: no figures were logged yet"):
            WeightDecayMonitor().plot()

    def test_without_matplotlib(self, monitor, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        with pytest.raises(ModuleNotFoundError, match=r"plot\(\) needs matplotlib: pip install matplotlib"):
            monitor.plot()


@pytest.mark.parametrize("every_n_steps", [0, -1, 1.5, True, "5"])
def test_a_wrong_every_n_steps(every_n_steps):
    with pytest.raises(MisconfigurationException, match="every_n_steps must be a whole number of at least 1, or None"):
        WeightDecayMonitor(every_n_steps)


@pytest.mark.parametrize("name", ["prog_bar", "summary"])
@pytest.mark.parametrize("value", ["yes", "False", 1, 0, None])
def test_a_switch_that_is_none(name, value):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r}"):
        WeightDecayMonitor(**{name: value})


def test_a_switch_that_is_none_may_be_more_than_a_switch():
    with pytest.raises(TypeError, match="got 'begin'; 'start', 'end' and 'both' will do too"):
        WeightDecayMonitor(summary="begin")
    with pytest.raises(TypeError, match="got 'loss'; 'total', a key such as 'head/l2_norm' and a list of keys will do"):
        WeightDecayMonitor(prog_bar="loss")


@pytest.mark.parametrize("prefix", ["", "a*", "/a", "a//b", None])
def test_a_wrong_prefix(prefix):
    with pytest.raises(MisconfigurationException, match="prefix must be letters, digits"):
        WeightDecayMonitor(prefix=prefix)


def test_training_is_not_changed_by_watching_it():
    models = [LitRules(), LitRules()]
    trainer(max_epochs=3).fit(models[0])
    trainer(max_epochs=3, callbacks=[WeightDecayMonitor(every_n_steps=1)]).fit(models[1])
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_a_model_without_optimizer_is_no_crash():
    class Lit(LitBase):
        def configure_optimizers(self):
            return None

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.body(batch[0]), torch.zeros(1))

    trainer(callbacks=[WeightDecayMonitor()]).fit(Lit())
