"""What people met with optimizers and models that are put together in other ways than torch's own."""

from __future__ import annotations

import io

import pytest
import torch
from field.fits import (
    EPOCH,
    LINEAR,
    OWN,
    RULES,
    Log,
    MyAdamW,
    MySGD,
    Notes,
    both_ways,
    fit,
    fitted,
    note,
    strengths,
    used,
    used_by_weights,
)
from helpers import SAM, LitBase, Net, digits
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_regdecay import (
    WeightDecayMixin,
    WeightDecayMonitor,
    apply_decay_rules,
    build_decay_groups,
    schedule_weight_decay,
)


class Muon(torch.optim.Optimizer):
    """As the reference with auxiliary Adam: no defaults, and options that every group has to bring."""

    def __init__(self, groups):
        for group in groups:
            group.setdefault("lr", 0.02 if group["use_muon"] else 0.001)
            group.setdefault("weight_decay", 0.0)
        super().__init__(groups, {})
        self.log = Log()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        note(self)
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad / p.grad.norm() if group["use_muon"] else p.grad
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
        return loss


class TestOptimizers:
    @both_ways
    def test_sharpness_aware_minimization_and_factors(self, way):
        """SAM holds the same groups as its base optimizer: factors were multiplied twice, in parts with odd names."""

        class Theirs(LitBase):
            def configure_optimizers(self):
                return SAM(self.parameters(), MySGD, lr=0.05, momentum=0.9, weight_decay=OWN)

        rules = {"*.bias": 0.0, "head.*": {"decay_mult": 0.5}, "*": {"decay_mult": 2.0}}
        model, run = fitted(way, Theirs, rules)
        expected = {**strengths(model, 2.0 * OWN), "head.weight": 0.5 * OWN}
        assert used(model, run.optimizers[0].base_optimizer) == [expected] * EPOCH

    def test_a_step_that_fails_before_one_in_two_phases(self):
        """Out of memory in the closure of a step; in ``first_step`` and ``second_step`` afterwards λ stood still."""
        model = Net()
        groups = build_decay_groups(model, LINEAR)
        optimizer = SAM(groups.as_param_groups(OWN), MySGD, lr=0.1, weight_decay=OWN)
        schedule_weight_decay(optimizer, total_steps=10)

        def fail():
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(fail)
        for _ in range(3):
            optimizer.second_step()
        assert used_by_weights(model, optimizer.base_optimizer) == [1.0, 0.9, 0.8]

    def test_a_step_that_calls_that_of_its_base(self):
        """A subclass that clips before ``super().step()``: each step counted twice, if AdamW had been in use."""

        class Clipping(MyAdamW):
            def step(self, closure=None):
                loss = None if closure is None else torch.enable_grad()(closure)()
                nn.utils.clip_grad_value_([p for group in self.param_groups for p in group["params"]], 0.1)
                super().step()
                return loss

        class Lit(WeightDecayMixin, LitBase):
            decay_rules = LINEAR

            def build_optimizer(self, param_groups):
                torch.optim.AdamW([torch.ones(1)])
                return Clipping(param_groups)

        model = Lit()
        run = fit(model, "own", None)
        assert used_by_weights(model, run.optimizers[0]) == [1.0, 0.75, 0.5, 0.25]

    @both_ways
    def test_muon_with_auxiliary_adam(self, way):
        """The reference Muon has no defaults: it was taken for one without weight decay."""

        class Theirs(LitBase):
            def configure_optimizers(self):
                parts = [[p for p in self.parameters() if (p.ndim == 2) == hidden] for hidden in (True, False)]
                groups = zip(parts, (True, False))
                return Muon([{"params": params, "use_muon": uses, "weight_decay": OWN} for params, uses in groups])

        rules = {"*.bias": 0.0, "head.*": 0.3, "*": {"decay_mult": 2.0}}
        model, run = fitted(way, Theirs, rules)
        assert used(model, run.optimizers[0]) == [{**strengths(model, 2.0 * OWN), "head.weight": 0.3}] * EPOCH

    @pytest.mark.parametrize("way", ["mixin", "callback", "own"])
    def test_an_optimizer_with_sharded_states(self, way):
        """ZeroRedundancyOptimizer makes an optimizer of its own inside: groups and λ did not get there."""

        class Theirs(LitBase):
            def configure_optimizers(self):
                return ZeroRedundancyOptimizer(self.parameters(), optimizer_class=MyAdamW, lr=0.01)

        class Own(WeightDecayMixin, LitBase):
            decay_rules = RULES

            def build_optimizer(self, param_groups):
                return ZeroRedundancyOptimizer(param_groups, optimizer_class=MyAdamW, lr=0.01)

        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            model, run = fitted(way, Own if way == "own" else Theirs, RULES)
        finally:
            torch.distributed.destroy_process_group()
        assert used(model, run.optimizers[0].optim) == [strengths(model, 0.5)] * EPOCH

    def test_an_lr_that_is_none(self, tmp_path):
        """Adafactor by default finds its own lr, and has None: monitor and resuming did sums with it."""
        adafactor = pytest.importorskip("transformers.optimization").Adafactor

        class Adafactor(Notes, adafactor):
            pass

        class Lit(WeightDecayMixin, LitBase):
            decay_rules = RULES

            def build_optimizer(self, param_groups):
                return Adafactor(param_groups, lr=None, relative_step=True, warmup_init=True, weight_decay=0.0)

        fit(Lit(), "own", None).save_checkpoint(tmp_path / "one.ckpt")
        model, monitor = Lit(), WeightDecayMonitor()
        run = fit(model, "own", None, monitor, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
        assert used(model, run.optimizers[0]) == [strengths(model, 0.5)] * EPOCH
        assert run.optimizers[0].param_groups[0]["lr"] is None
        assert monitor.history[-1]["decay/rest/weight_decay"] == 0.5


class Node(nn.Module):
    """Holds what it takes its inputs from."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs = nn.ModuleList(inputs)
        self.layer = nn.Linear(2, 2)


class Parallel(nn.DataParallel):
    """A wrapper with something of its own."""

    def __init__(self, module):
        super().__init__(module)
        self.scale = nn.Linear(2, 2, bias=False)


class TwoOfAWrapper(nn.Module):
    """Has attributes as wrappers call theirs."""

    def __init__(self, one, other):
        super().__init__()
        setattr(self, one, nn.Linear(2, 2))
        setattr(self, other, nn.Linear(2, 2))


def step_with(model, rules):
    """What a step of an optimizer over all parameters uses."""
    optimizer = MySGD(model.parameters())
    apply_decay_rules(optimizer, model, rules)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return used(model, optimizer)[-1]


class TestModels:
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
    def test_a_scripted_encoder_from_a_file(self):
        """Parameters inside of a ScriptModule were in no group."""
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(nn.Sequential(nn.Sequential(nn.Linear(64, 16), nn.ReLU()))), file)
        file.seek(0)
        model = nn.Sequential(torch.jit.load(file), nn.Linear(16, 10))
        assert step_with(model, RULES) == strengths(model, 0.5)
        optimizer = MySGD(build_decay_groups(model, RULES).as_param_groups())
        pixels, classes = digits(64)
        nn.functional.cross_entropy(model(pixels), classes).backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
        assert used(model, optimizer) == [strengths(model, 0.5)]
        assert not any(map(torch.equal, model.parameters(), before))

    def test_names_with_brackets(self):
        """Tabular models name a layer after each column, ``price[eur]``: a name in full did not match itself."""
        columns = ("price[eur]", "size[m]", "age")
        model = nn.ModuleDict({column: nn.Embedding(5, 4) for column in columns})
        found = step_with(model, {"price[eur].weight": 0.3, "*": 0.1})
        assert found == {"price[eur].weight": 0.3, "size[m].weight": 0.1, "age.weight": 0.1}

    @pytest.mark.parametrize(
        "model",
        [nn.Sequential(Parallel(nn.Linear(2, 2))), TwoOfAWrapper("_orig_mod", "_original_module")],
        ids=["DataParallel", "attributes of wrappers"],
    )
    def test_names_that_are_one_without_wrappers(self, model):
        """Two parameters came to one name, and one of them was in no group."""
        assert step_with(model, RULES) == strengths(model, 0.5)

    def test_or_an_error(self):
        """Where they cannot be told apart, nothing is trained without rules in silence."""
        model = TwoOfAWrapper("_forward_module", "_original_module")
        optimizer = MySGD(model.parameters())
        before = {name: value for name, value in vars(optimizer).items() if "hooks" not in name}
        with pytest.raises(ValueError, match="two parameters of TwoOfAWrapper come to the name 'weight'"):
            apply_decay_rules(optimizer, model, RULES)
        assert {name: value for name, value in vars(optimizer).items() if "hooks" not in name} == before
        assert not optimizer._optimizer_step_pre_hooks

    def test_a_graph_of_modules_that_hold_earlier_ones(self):
        """As many paths as there are ways through the graph: building the groups took hours."""
        nodes = []
        for _ in range(60):
            nodes.append(Node(nodes[-2:]))
        assert step_with(nodes[-1], RULES) == strengths(nodes[-1], 0.5)
