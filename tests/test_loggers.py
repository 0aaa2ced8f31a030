"""What each logger holds in the end, read back from its own files."""

from __future__ import annotations

import csv
import json
import struct
import time

import pytest
import torch
import yaml
from helpers import LitBase, LitHparams, members, trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_regdecay import (
    DecayRule,
    WeightDecayMixin,
    WeightDecayMonitor,
    WeightDecayRules,
    build_decay_groups,
)
from lightning_regdecay.rules.forms import parse_rules, shortest_rules

BLOCK, FULL, LAST = 32768, 1, 4
RULES = {"*.bias": 0.0, "slow": {"params": ["head.*", "norm.*"], "weight_decay": "1e-3"}, "*": 0.05}
KEYS = {
    *(
        f"decay/{group}/{figure}"
        for group in ("bias", "slow", "rest")
        for figure in ("l2_norm", "penalty", "weight_decay")
    ),
    "decay/total/penalty",
}


def fit(logger):
    """Two epochs of four steps, logged every two steps; the monitor's history."""
    monitor = WeightDecayMonitor(every_n_steps=2)
    trainer(max_epochs=2, callbacks=[monitor], logger=logger).fit(LitHparams(lr=0.01, decay_rules=RULES))
    assert [record["step"] for record in monitor.history] == [2, 4, 6, 8]
    return monitor.history


def values(history, key):
    return [record[key] for record in history]


def test_csv(tmp_path):
    history = fit(CSVLogger(tmp_path, name="", version=""))
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["decay/total/penalty"]]
    assert [(int(row["epoch"]), int(row["step"])) for row in rows] == [(0, 1), (0, 3), (1, 5), (1, 7)]
    for key in KEYS:
        assert [float(row[key]) for row in rows] == values(history, key)


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    history = fit(TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path)).Reload()
    for key in KEYS:
        assert [event.step for event in events.Scalars(key)] == [1, 3, 5, 7]
        assert [event.value for event in events.Scalars(key)] == pytest.approx(values(history, key), rel=1e-6)
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    info = HParamsPluginData.FromString(content).session_start_info.hparams
    shown = {
        name: value.number_value if value.HasField("number_value") else value.string_value
        for name, value in info.items()
    }
    assert shown == {
        "lr": 0.01,
        "decay_rules/*.bias": 0.0,
        "decay_rules/slow/params": "['head.*', 'norm.*']",
        "decay_rules/slow/weight_decay": 0.001,
        "decay_rules/*": 0.05,
    }


def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}")
    history = fit(logger)
    client = logger.experiment
    for key in KEYS:
        stored = sorted(client.get_metric_history(logger.run_id, key), key=lambda metric: metric.step)
        assert [(metric.step, metric.value) for metric in stored] == list(zip([1, 3, 5, 7], values(history, key)))
    # MLflow refuses `*` in names: the rules go by the names of their groups.
    assert client.get_run(logger.run_id).data.params == {
        "lr": "0.01",
        "decay_rules/bias/params": "*.bias",
        "decay_rules/bias/weight_decay": "0.0",
        "decay_rules/slow/params": "['head.*', 'norm.*']",
        "decay_rules/slow/weight_decay": "0.001",
        "decay_rules/rest/params": "*",
        "decay_rules/rest/weight_decay": "0.05",
    }


def test_a_list_of_schedules_has_a_value_per_number(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    loggers = [TensorBoardLogger(tmp_path, name="", version=""), MLFlowLogger(tracking_uri=f"file:{tmp_path / 'ml'}")]
    trainer(logger=loggers).fit(LitHparams(lr=0.01, decay_rules=TENTH))
    params = loggers[1].experiment.get_run(loggers[1].run_id).data.params
    assert params == {
        "lr": "0.01",
        "decay_rules/head/params": "head.*",
        "decay_rules/head/decay_mult": "0.1",
        "decay_rules/head/of": "rest",
        "decay_rules/rest/params": "*",
        **{
            f"decay_rules/rest/weight_decay/{i}/{key}": str(v) for i, one in enumerate(STAGES) for key, v in one.items()
        },
    }
    assert yaml.safe_load((tmp_path / "hparams.yaml").read_text())["decay_rules"]["rest"]["weight_decay"] == STAGES


def leveldb_records(data, offset):
    """The records of a log in LevelDB's format, which W&B's offline files keep to after a header of their own.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    record, position = b"", 0
    while position + 7 <= len(data):
        left = BLOCK - (position + offset) % BLOCK
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if position + 7 + length > len(data):
            return  # in the middle of being written
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (FULL, LAST):
            yield record
            record = b""


def wandb_records(folder, seconds=60):
    """All records of the only run, once W&B's own process has written the last one."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        records = [Record.FromString(data) for data in leveldb_records(path.read_bytes()[7:], offset=7)]
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"W&B did not finish its file in {seconds} s")


def test_wandb_offline(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    history = fit(logger)
    logger.experiment.finish()
    rows, config = [], {}
    for record in wandb_records(tmp_path):
        rows.append(
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        )
        for update in [*record.run.config.update, *record.config.update]:
            config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    rows = [row for row in rows if "decay/total/penalty" in row]
    assert [row["trainer/global_step"] for row in rows] == [1, 3, 5, 7]
    for key in KEYS:
        assert [row[key] for row in rows] == pytest.approx(values(history, key), rel=1e-12)
    assert config["decay_rules"] == shortest_rules(RULES)  # numbers are numbers


def test_several_loggers_and_none(tmp_path):
    loggers = [CSVLogger(tmp_path / "a", name="", version=""), CSVLogger(tmp_path / "b", name="", version="")]
    fit(loggers)
    written = (tmp_path / "a" / "metrics.csv").read_text()
    assert "decay/slow/l2_norm" in written
    assert written == (tmp_path / "b" / "metrics.csv").read_text()
    fit(False)


class LitPlain(LitBase):
    """With hyperparameters, and none of ours."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class LitClass(LitHparams):
    decay_rules = {"*.bias": 0.0, "*": "1e-1"}


VECTORS = {"weight_decay": 0.0, "max_ndim": 1}
STAGES = [{"schedule": "constant", "start": 0.1, "steps": 2}, {"schedule": "linear", "start": 0.1, "end": 0.0}]
TENTH = {"head.*": {"decay_mult": 0.1, "of": "rest"}, "*": STAGES}
WAYS = {
    "class attribute": (LitClass, None, {"lr": 0.001, "decay_rules": {"*.bias": 0.0, "*": 0.1}}),
    "no hyperparameters": (
        type("LitOwn", (WeightDecayMixin, LitBase), {"decay_rules": {"*": 0.1}}),
        None,
        {"decay_rules": {"*": 0.1}},
    ),
    "list": (
        lambda: LitHparams(decay_rules=[DecayRule(0.0, max_ndim=1, group="vectors"), DecayRule(0.1)]),
        None,
        {"lr": 0.001, "decay_rules": {"vectors": VECTORS, "rest": {"weight_decay": 0.1, "params": "*"}}},
    ),
    "preset": (lambda: LitHparams(decay_rules="timm"), None, {"lr": 0.001, "decay_rules": {"preset": "timm"}}),
    "schedules": (lambda: LitHparams(decay_rules=TENTH), None, {"lr": 0.001, "decay_rules": TENTH}),
    "schedules by a callback": (LitPlain, TENTH, {"lr": 0.01, "decay_rules": TENTH}),
    "callback": (LitPlain, {"head.*": 0.2, "*": 0.1}, {"lr": 0.01, "decay_rules": {"head.*": 0.2, "*": 0.1}}),
}


@pytest.mark.parametrize(("make", "rules", "expected"), WAYS.values(), ids=WAYS)
def test_the_rules_in_force_are_logged_whatever_way_they_came(tmp_path, make, rules, expected):
    callbacks = [] if rules is None else [WeightDecayRules(rules)]
    run = trainer(logger=CSVLogger(tmp_path, name="", version=""), callbacks=callbacks)
    model = make()
    run.fit(model)
    assert yaml.safe_load((tmp_path / "hparams.yaml").read_text()) == expected
    run.save_checkpoint(tmp_path / "model.ckpt")
    stored = torch.load(tmp_path / "model.ckpt", weights_only=True)["decay_rules"]
    in_force = model.decay_groups if rules is None else build_decay_groups(model, rules)
    assert members(build_decay_groups(model, stored)) == members(in_force)
    assert parse_rules(stored) == in_force.rules
