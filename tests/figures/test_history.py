"""What a monitor keeps of a run, as rows, and what it says of it at the end."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from helpers import LitBase, LitHparams, trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_regdecay import WeightDecayMonitor
from lightning_regdecay.figures import history
from lightning_regdecay.figures.history import Exposure, Thinning, end_table, rows

RULES = {"*.bias": 0.0, "*": 0.1}


class TestThinning:
    @pytest.mark.parametrize("most", [2, 3, 4, 7, 10])
    def test_few_are_kept_evenly_spaced_the_first_and_the_last_always(self, most, monkeypatch):
        monkeypatch.setattr(history, "MOST_EVENTS", most)
        thinning, kept = Thinning(), []
        for step in range(200):
            thinning.append(kept, {"step": step})
            found = [record["step"] for record in kept]
            assert found[0] == 0
            assert found[-1] == step
            assert len(found) <= most
            gaps = [b - a for a, b in itertools.pairwise(found)]
            assert set(gaps[:-1]) <= {thinning.stride}
            assert not gaps or gaps[-1] <= thinning.stride
            assert len(found) >= min(step + 1, most // 2)

    @pytest.mark.parametrize("at", [3, 57, 100])
    def test_it_goes_on_from_a_state(self, at, monkeypatch):
        monkeypatch.setattr(history, "MOST_EVENTS", 10)
        whole, resumed = [], []
        one, first, second = Thinning(), Thinning(), Thinning()
        for step in range(150):
            one.append(whole, {"step": step})
            if step == at:
                second.load(first.state(), resumed)
            (first if step < at else second).append(resumed, {"step": step})
        assert resumed == whole

    def test_of_a_monitor(self, monkeypatch, tmp_path):
        monkeypatch.setattr(history, "MOST_EVENTS", 4)
        monitor = WeightDecayMonitor(every_n_steps=1)
        run = trainer(max_epochs=3, callbacks=[monitor])
        run.fit(LitHparams(decay_rules=RULES))
        assert [record["step"] for record in monitor.history] == [1, 5, 9, 12]
        run.save_checkpoint(tmp_path / "run.ckpt")
        again = WeightDecayMonitor(every_n_steps=1)
        trainer(max_epochs=4, callbacks=[again]).fit(
            LitHparams(decay_rules=RULES), ckpt_path=tmp_path / "run.ckpt", weights_only=True
        )
        assert [record["step"] for record in again.history] == [1, 9, 16]

    def test_a_checkpoint_without_its_state_is_taken_up(self):
        monitor = WeightDecayMonitor()
        monitor.load_state_dict({"history": [{"epoch": 0, "step": 1}]})
        assert monitor._thinning.state() == {"seen": 1, "stride": 1}


class TestRows:
    def run(self, **options):
        monitor = WeightDecayMonitor(**options)
        trainer(max_epochs=2, callbacks=[monitor]).fit(LitHparams(decay_rules=RULES))
        return monitor

    def test_a_row_for_each_event_and_group(self):
        monitor = self.run(prefix="train/wd")
        found = monitor.records()
        assert [(row["step"], row["group"]) for row in found] == [
            *((4, name) for name in ("bias", "rest", "total")),
            *((8, name) for name in ("bias", "rest", "total")),
        ]
        assert found[1]["l2_norm"] == monitor.history[0]["train/wd/rest/l2_norm"]
        assert found[-1] == {
            "epoch": 1,
            "step": 8,
            "group": "total",
            "penalty": monitor.history[1]["train/wd/total/penalty"],
        }

    def test_names_of_groups_with_slashes(self):
        assert rows([{"epoch": 0, "step": 1, "decay/Adam/0/l2_norm": 2.0}], "decay") == [
            {"epoch": 0, "step": 1, "group": "Adam/0", "l2_norm": 2.0}
        ]

    def test_as_a_frame(self):
        pandas = pytest.importorskip("pandas")
        monitor = self.run(figures=["rms", "l2_norm"])
        frame = monitor.to_frame()
        assert list(frame.columns) == ["epoch", "step", "group", "rms", "l2_norm"]
        assert len(frame) == 4
        assert frame[frame.group == "rest"].l2_norm.iloc[-1] == monitor.history[-1]["decay/rest/l2_norm"]
        assert isinstance(frame, pandas.DataFrame)

    def test_without_pandas(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pandas", None)
        with pytest.raises(ModuleNotFoundError, match="to_frame\\(\\) needs pandas: pip install pandas"):
            self.run().to_frame()


class TestProgressBar:
    @pytest.mark.parametrize(
        ("given", "shown"),
        [
            ("total", {"decay/total/penalty"}),
            (["total"], {"decay/total/penalty"}),
            (["rest/l2_norm", "total"], {"decay/total/penalty", "decay/rest/l2_norm"}),
            ("decay/*/l2_norm", {"decay/rest/l2_norm", "decay/bias/l2_norm"}),
            (False, set()),
        ],
    )
    def test_what_is_asked_for(self, given, shown):
        run = trainer(max_epochs=1, callbacks=[WeightDecayMonitor(prog_bar=given)])
        run.fit(LitHparams(decay_rules=RULES))
        assert {key for key in run.progress_bar_metrics if key.startswith("decay/")} == shown

    def test_small_numbers_are_legible(self):
        run = trainer(max_epochs=1, callbacks=[WeightDecayMonitor(prog_bar=["rest/weight_decay"])])
        run.fit(LitHparams(decay_rules={"*.bias": 0.0, "*": 1.23456e-5}))
        assert run.progress_bar_metrics["decay/rest/weight_decay"] == "1.23e-05"


class TestEnd:
    def test_the_table(self, capsys, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # plain text
        monitor = WeightDecayMonitor(summary="end", figures=["l2_norm", "equilibrium"])
        trainer(max_epochs=2, callbacks=[monitor]).fit(LitHparams(decay_rules=RULES))
        printed = capsys.readouterr().out
        assert re.search(r"^group +first norm +last norm +rms / at rest +remark$", printed, re.MULTILINE)
        first, last = (f"{record['decay/bias/l2_norm']:.4g}" for record in (monitor.history[0], monitor.history[-1]))
        assert re.search(rf"^bias +{first} +{last} +- +no decay reached it$", printed, re.MULTILINE)
        assert re.search(r"^rest .* decay alone took 0%: the run is too short for its norm", printed, re.MULTILINE)
        assert "tensors" not in printed

    @pytest.mark.parametrize(("summary", "tables"), [(True, 1), ("start", 1), ("both", 2), (False, 0)])
    def test_on_request(self, summary, tables, capsys, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        trainer(max_epochs=1, callbacks=[WeightDecayMonitor(summary=summary)]).fit(LitHparams(decay_rules=RULES))
        assert len(re.findall(r"^group ", capsys.readouterr().out, re.MULTILINE)) == tables

    def test_what_is_off(self):
        exposure = Exposure()
        rates = {"none": 0.0, "fast": math.log(2) / 30, "slow": 1e-3, "right": 1e-2, "coupled": 1e-3}
        exposure.begin(0, rates)
        for step in (100, 200):
            exposure.add(step, rates)
        events = [{"step": s, **{f"d/{n}/l2_norm": 1.0 for n in rates}} for s in (100, 200)]
        events.append({"step": 300, "d/right/l2_norm": 1.0, "d/bad/l2_norm": math.nan})
        remarks = {row[0]: row[-1] for row in end_table(events, "d", exposure, rates.keys() - {"coupled"}).rows}
        assert remarks == {
            "none": "no decay reached it",
            "fast": "decay alone halves it in 30 steps",
            "slow": "decay alone took 18%: the run is too short for its norm to come to rest",
            "right": "",
            "coupled": "",
            "bad": "NaN or infinity since step 300",
        }

    def test_decay_is_counted_over_the_steps(self):
        class Lit(LitBase):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.5)

        monitor = WeightDecayMonitor(every_n_steps=3)
        trainer(max_epochs=2, callbacks=[monitor]).fit(Lit())
        assert monitor._exposure.total == {"0": pytest.approx(0.05 * 8)}

    def test_decay_that_falls_to_zero_has_reached_a_group(self, capsys, monkeypatch):
        class Lit(LitHparams):
            def build_lr_scheduler(self, optimizer):
                schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
                return {"scheduler": schedule, "interval": "step"}

        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monitor = WeightDecayMonitor(summary="end")
        trainer(max_epochs=1, callbacks=[monitor]).fit(Lit(lr=0.1, decay_rules={"*": 0.5}))
        assert monitor._exposure.total == {"rest": pytest.approx(0.1 * 0.5 / 2 * 4)}
        assert "no decay reached it" not in capsys.readouterr().out

    def test_a_run_that_has_nothing_left_to_do_says_nothing(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        run = trainer(max_epochs=1, callbacks=[WeightDecayMonitor()])
        run.fit(LitHparams(decay_rules=RULES))
        run.save_checkpoint(tmp_path / "run.ckpt")
        capsys.readouterr()
        again = trainer(max_epochs=1, callbacks=[WeightDecayMonitor(summary="end")])
        again.fit(LitHparams(decay_rules=RULES), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
        assert "remark" not in capsys.readouterr().out

    def test_the_decay_of_a_run_goes_on_from_a_checkpoint(self, tmp_path):
        totals = []
        for stops in ([2], [1, 2]):
            path = None
            for epochs in stops:
                monitor = WeightDecayMonitor()
                run = trainer(max_epochs=epochs, callbacks=[monitor])
                run.fit(LitHparams(decay_rules=RULES), ckpt_path=path)
                path = tmp_path / "run.ckpt"
                run.save_checkpoint(path)
            totals.append(monitor._exposure.total)
        assert totals[0] == pytest.approx(totals[1])


def test_tensorboard_has_a_chart_for_each_figure(tmp_path, monkeypatch):
    layouts = []
    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(type(logger.experiment), "add_custom_scalars", lambda self, layout: layouts.append(layout))
    monitor = WeightDecayMonitor(every_n_steps=1, figures=["l2_norm", "rms"])
    trainer(max_epochs=1, callbacks=[monitor], logger=logger).fit(LitHparams(decay_rules=RULES))
    [layout] = layouts
    assert list(layout) == ["decay"]
    for name, (kind, [pattern]) in layout["decay"].items():
        assert kind == "Multiline"
        keys = [key for key in monitor.history[0] if re.search(pattern, key)]
        assert keys == [f"decay/{group}/{name}" for group in ("bias", "rest")]


@pytest.mark.parametrize(("name", "value"), [("prog_bar", 1), ("prog_bar", [1]), ("summary", "yes"), ("summary", 1)])
def test_switches_that_are_none(name, value):
    with pytest.raises(TypeError, match=f"{name} must be True or False"):
        WeightDecayMonitor(**{name: value})
