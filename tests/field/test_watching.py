"""What people met with the monitor, its metric, and what loggers take."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from field.fits import LitOwn, MySGD, fit
from helpers import LitBase, float64_norm, trainer
from lightning.pytorch.loggers import MLFlowLogger
from torch import nn

from lightning_regdecay import GroupL2Norm, WeightDecayMixin, WeightDecayMonitor


def watched(model, **options):
    """The last record of a monitor."""
    monitor = WeightDecayMonitor(summary=False)
    fit(model, "without", None, monitor, **options)
    return monitor.history[-1]


def test_a_sparse_parameter():
    """A graph network with a sparse adjacency to be trained: the monitor stopped the fit."""

    class Graph(LitBase):
        def __init__(self):
            super().__init__()
            edges = torch.tensor([[0, 1], [1, 2]])
            self.adjacency = nn.Parameter(torch.sparse_coo_tensor(edges, torch.tensor([3.0, 4.0]), (4, 4)).coalesce())

        def training_step(self, batch, batch_idx):
            mixed = torch.sparse.mm(self.adjacency, torch.ones(4, 1)).sum()
            return super().training_step(batch, batch_idx) + 0.0 * mixed

        def configure_optimizers(self):
            return torch.optim.SGD(
                [{"params": [self.adjacency], "lr": 0.0}, {"params": self.head.parameters()}], lr=0.1
            )

    model = Graph()
    record = watched(model)
    assert record["decay/0/l2_norm"] == 5.0
    assert record["decay/1/l2_norm"] == pytest.approx(float64_norm(model.head.parameters()), rel=1e-6)


def test_what_a_failed_fit_leaves():
    """After out of memory in a notebook, the monitor held the model's parameters, and so the memory."""

    class Failing(LitOwn):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    model, monitor = Failing(), WeightDecayMonitor(summary=False)
    run = trainer(callbacks=[monitor])
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit(model)
    weight = weakref.ref(model.head.weight)
    del model, run
    gc.collect()
    assert weight() is None


def test_parameters_that_are_not_the_models():
    """Fast weights in an optimizer under a name that the model has: the norm of the model's own was shown."""

    class Fast(LitBase):
        def __init__(self):
            super().__init__()
            self.fast = [nn.Parameter(torch.full((4, 4), 100.0))]

        def configure_optimizers(self):
            return MySGD([("body.weight", self.fast[0])], lr=0.0)

    assert watched(Fast())["decay/0/l2_norm"] == 400.0


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
def test_a_metric_inside_of_a_module_that_is_cast(precision, dtype):
    """A ``GroupL2Norm`` as an attribute of the model went to half precision with it, and its sums with it."""

    class Lit(LitOwn):
        def __init__(self):
            super().__init__()
            self.norms = GroupL2Norm(["body"])
            with torch.no_grad():
                self.body.weight.mul_(200)  # squares beyond what float16 holds

        def build_optimizer(self, param_groups):
            return MySGD(param_groups)

        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0].to(dtype), batch[1]], batch_idx)

        def on_train_epoch_end(self):
            self.norms.update({"body": [self.body.weight]})
            self.found, self.truth = self.norms.compute()["body"], float64_norm([self.body.weight])

    model = Lit()
    fit(model, "own", None, precision=precision, limit_train_batches=1)
    assert model.body.weight.dtype == dtype
    assert model.found.dtype == torch.float64
    assert float(model.found) == pytest.approx(model.truth, rel=1e-6)


NO_DECAY = [f"*.{name}{number}.*" for name in ("layer_norm", "rotary_embedding", "logit_scale") for number in range(10)]


@pytest.mark.parametrize("form", ["list", "regular expression"])
def test_a_rule_of_many_patterns_and_mlflow(form, tmp_path, monkeypatch):
    """MLflow takes keys of 250 characters at most; a group that is named after all its patterns had more."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    class Lit(WeightDecayMixin, LitBase):
        def __init__(self, decay_rules):
            super().__init__()
            self.save_hyperparameters()

    patterns = [*NO_DECAY, "*norm*"]
    rules = {
        "list": [{"params": patterns, "weight_decay": 0.0, "optional": True}, {"weight_decay": 0.1}],
        "regular expression": {"re:" + "|".join(pattern.strip("*.") for pattern in patterns): 0.0, "*": 0.1},
    }[form]
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}")
    monitor = WeightDecayMonitor(summary=False)
    model = Lit(rules)
    trainer(callbacks=[monitor], logger=logger).fit(model)
    flat, rest = model.decay_groups.names
    stored = logger.experiment.get_run(logger.run_id).data.metrics
    for group, params in ((flat, [model.norm.weight, model.norm.bias]), (rest, [model.body.weight, model.head.weight])):
        assert len(f"decay/{group}/weight_decay") <= 250
        assert stored[f"decay/{group}/weight_decay"] == (0.0 if group == flat else 0.1)
        assert stored[f"decay/{group}/l2_norm"] > 0.0
        assert set(model.decay_groups[group].params.values()) >= set(params)
