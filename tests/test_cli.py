"""Configuration files and the command line: rules, optimizers and schedulers from both, the groups without a run."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from cli_run import QUIET, Digits, LitCallables, LitClassRules, LitPlain, LitTyped, report
from helpers import RULES, LitBase, LitRules, members, run_python
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn

import lightning_regdecay
from lightning_regdecay import (
    DecayRule,
    WeightDecayMixin,
    WeightDecayMonitor,
    WeightDecayRules,
    build_decay_groups,
    groups_in_force,
)
from lightning_regdecay.cli import WeightDecayCLI
from lightning_regdecay.rules.forms import DecayRules

PROGRAM = Path(__file__).with_name("cli_run.py")
TYPED = """
model:
  decay_rules:
    no_decay: {params: ["*.bias", "*norm*"], weight_decay: 0}
    head.*: 1e-3
    "*": 5e-2
"""
HEAD = {"params": "head.*", "weight_decay": 0.01}


def run(*args, cwd):
    """The report of a run of the program, in a process of its own."""
    return json.loads(run_python(PROGRAM, *args, cwd=cwd, timeout=120).splitlines()[-1])


def cli(model, *args, cls=WeightDecayCLI, **options):
    """The same program in this process."""
    defaults = {"save_config_callback": None, "trainer_defaults": QUIET, "seed_everything_default": 0}
    return cls(model, **{**defaults, **options}, args=list(map(str, args)))


def refused(capsys, model, *args, **options):
    """What the program says when it does not start."""
    with pytest.raises(SystemExit) as exit:
        cli(model, *args, **options)
    assert exit.value.code == 2
    return capsys.readouterr().err


def with_annotation(annotation):
    """A model whose argument ``decay_rules`` has this annotation, None for none."""

    class Lit(LitTyped):
        def __init__(self, decay_rules=None):
            super().__init__(decay_rules=decay_rules)
            self.save_hyperparameters()

    if annotation is not None:
        Lit.__init__.__annotations__["decay_rules"] = annotation
    return Lit


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])


@pytest.fixture
def typed(tmp_path):
    path = tmp_path / "typed.yaml"
    path.write_text(TYPED)
    return path


class LitUntyped(WeightDecayMixin, LitBase):
    """With rules as an argument of which nothing is known."""

    def __init__(self, lr=1e-3, decay_rules=None):
        super().__init__()
        self.save_hyperparameters()


class TestRulesAsAnArgument:
    def test_a_run_with_files_and_overrides_leaves_plain_data(self, tmp_path, typed):
        (tmp_path / "more.yaml").write_text("model: {lr: 0.25}\n")
        overrides = ["--model.decay_rules.head.*", "1e-2", "--model.decay_rules.no_decay.weight_decay=0.5"]
        result = run("WeightDecayCLI", "LitTyped", "fit", "-c", typed, "-c", "more.yaml", *overrides, cwd=tmp_path)
        assert result["groups"] == {"no_decay": [0.5, 0.25], "head": [0.01, 0.25], "rest": [0.05, 0.25]}

        code = (
            "import json, sys, torch; sys.modules['lightning_regdecay'] = None; "
            "print(json.dumps(torch.load('model.ckpt', weights_only=True)['hyper_parameters']['decay_rules']))"
        )
        rules = json.loads(run_python("-c", code, cwd=tmp_path, timeout=120).splitlines()[-1])
        no_decay = {"params": ["*.bias", "*norm*"], "weight_decay": 0.5}
        assert rules == {"no_decay": no_decay, "head.*": 0.01, "*": 0.05}

        model = LitTyped.load_from_checkpoint(tmp_path / "model.ckpt")
        assert model.hparams.lr == 0.25
        assert [group.strength_text for group in model.decay_groups] == ["0.5", "0.01", "0.05"]
        assert (
            LitTyped.load_from_checkpoint(tmp_path / "model.ckpt", decay_rules={"*": 0.3}).decay_groups[0].strength_text
            == "0.3"
        )

    def test_print_config_shows_the_rules_and_goes_round(self, tmp_path, typed, capsys):
        args = ["--model.decay_rules.head.*", "0.2", "--model.decay_rules.no_decay.max_ndim", 1]
        with pytest.raises(SystemExit):
            cli(LitTyped, "fit", "-c", typed, *args, "--print_config")
        printed = capsys.readouterr().out
        no_decay = {"params": ["*.bias", "*norm*"], "weight_decay": 0, "max_ndim": 1}
        assert yaml.safe_load(printed)["model"]["decay_rules"] == {"no_decay": no_decay, "head.*": 0.2, "*": 0.05}

        (tmp_path / "printed.yaml").write_text(printed)
        with pytest.raises(SystemExit):
            cli(LitTyped, "fit", "-c", tmp_path / "printed.yaml", "--print_config")
        assert capsys.readouterr().out == printed

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("head.*=-1", "decay rule 'head.*': weight_decay must be a finite number of at least 0, got -1"),
            ("head.*=nan", "decay rule 'head.*': weight_decay must be a finite number of at least 0, got nan"),
            ("head.*=much", "decay rule 'head.*': weight_decay must be a number, got the text 'much'"),
            ("no_decay.wieght_decay=1", "'no_decay': unknown field 'wieght_decay'; did you mean 'weight_decay'?"),
            ("no_decay.min_ndim=1.5", "decay rule 'no_decay': min_ndim must be a whole number of dimensions, got 1.5"),
            ("head.*.options.weight_decay=1", "options may not hold 'weight_decay': the rule itself sets it"),
        ],
    )
    def test_a_wrong_value_is_refused_by_name(self, typed, capsys, override, message):
        error = refused(capsys, LitTyped, "fit", "-c", typed, f"--model.decay_rules.{override}")
        assert "error: model.decay_rules: " in error
        assert message in error

    @pytest.mark.parametrize(
        ("override", "rule"),
        [
            ("head.*.end=0.2", {"schedule": "linear", "start": 0.1, "end": 0.2}),
            ("head.*.epochs=5", {"schedule": "linear", "start": 0.1, "end": 0, "epochs": 5}),
            ("head.*=1e-2", 0.01),
            ("head.*={schedule: follow_lr, start: 0.1}", {"schedule": "follow_lr", "start": 0.1}),
            (
                "head.*.min_ndim=2",
                {
                    "params": "head.*",
                    "weight_decay": {"schedule": "linear", "start": 0.1, "end": 0},
                    "min_ndim": 2,
                },
            ),
            ("head.*.weight_decay.end=1", {"weight_decay": {"schedule": "linear", "start": 0.1, "end": 1}}),
            ("*.weight_decay.end=1", {"params": "*", "weight_decay": {"schedule": "linear", "start": 0.1, "end": 1}}),
        ],
    )
    def test_a_schedule_changes_by_field_or_as_a_whole(self, tmp_path, override, rule):
        linear = {"schedule": "linear", "start": 0.1, "end": 0}
        rules = {"head.*": linear, "*": {"params": "*", "weight_decay": linear}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"decay_rules": rules}}))
        args = ["-c", tmp_path / "config.yaml", f"--model.decay_rules.{override}"]
        model = cli(LitTyped, *args, run=False).model
        assert model.hparams.decay_rules == {**rules, "*" if override.startswith("*") else "head.*": rule}

    @pytest.mark.parametrize(
        "before", ["0.1", "{schedule: linear, start: 0.1, end: 0}", "{weight_decay: 0.1, min_ndim: 2}"]
    )
    def test_a_list_of_schedules_takes_the_place_of_what_was_there(self, tmp_path, before):
        (tmp_path / "config.yaml").write_text(f"model: {{decay_rules: {{head.*: {before}, '*': 0.2}}}}")
        text = "[{schedule: constant, start: 0.1, epochs: 2}, {schedule: linear, start: 1e-1, end: 0}]"
        model = cli(LitTyped, "-c", tmp_path / "config.yaml", f"--model.decay_rules.head.*={text}", run=False).model
        [group] = [group for group in model.decay_groups if group.name == "head"]
        assert group.strength_text == "constant 0.1 over 2 epochs, then linear 0.1 to 0"
        assert group.rule.min_ndim == (2 if "min_ndim" in before else None)

    @pytest.mark.parametrize(
        ("override", "text"),
        [
            ("head.*.stage_2.end=0.05", "constant 0.1 over 2 epochs, then linear 0.1 to 0.05"),
            ("head.*.stage_1.steps=9", "constant 0.1 over 9 steps, then linear 0.1 to 0"),
            ("head.*.stage_2={schedule: constant, start: 1e-3}", "constant 0.1 over 2 epochs, then constant 0.001"),
            ("body.weight_decay.stage_1.start=3", "constant 3 over 2 epochs, then linear 0.1 to 0"),
        ],
    )
    def test_one_stage_of_a_list_changes(self, tmp_path, override, text):
        stages = [{"schedule": "constant", "start": 0.1, "epochs": 2}, {"schedule": "linear", "start": 0.1, "end": 0}]
        rules = {"head.*": stages, "body": {"params": "body.*", "weight_decay": stages}, "*": 0.2}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"decay_rules": rules}}, sort_keys=False))
        args = ["-c", tmp_path / "config.yaml", f"--model.decay_rules.{override}"]
        groups = cli(LitTyped, *args, run=False).model.decay_groups
        [name] = {"head", "body"} & set(override.replace("*", "").split("."))
        assert groups[name].strength_text == text
        others = {"head", "body", "rest"} - {name}
        assert {groups[other].strength_text for other in others} == {
            "constant 0.1 over 2 epochs, then linear 0.1 to 0",
            "0.2",
        }

    def test_a_stage_that_a_list_does_not_have(self, tmp_path, capsys):
        stages = [{"schedule": "constant", "start": 0.1, "epochs": 2}, {"schedule": "linear", "start": 0.1, "end": 0}]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"decay_rules": {"*": stages}}}))
        error = refused(capsys, LitTyped, "fit", "-c", tmp_path / "config.yaml", "--model.decay_rules.*.stage_3.end=1")
        assert "there is no stage_3: the list has stages 1 to 2" in error

    def test_a_list_of_schedules_is_printed_and_goes_round(self, tmp_path, capsys):
        stages = [{"schedule": "constant", "start": 0.1, "epochs": 2}, {"schedule": "linear", "start": 0.1, "end": 0.0}]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"decay_rules": {"*": stages}}}))
        with pytest.raises(SystemExit):
            cli(LitTyped, "fit", "-c", tmp_path / "config.yaml", "--print_config")
        printed = capsys.readouterr().out
        assert yaml.safe_load(printed)["model"]["decay_rules"] == {"*": stages}

    def test_a_wrong_stage_is_refused_by_name(self, typed, capsys):
        override = "--model.decay_rules.head.*=[{schedule: linear, start: 0.1, end: 0}, {schedule: constant, start: 0}]"
        error = refused(capsys, LitTyped, "fit", "-c", typed, override)
        assert (
            "error: model.decay_rules: decay rule 'head.*': stage 1: a linear schedule needs steps, epochs or" in error
        )

    @pytest.mark.parametrize("model", [LitTyped, LitUntyped])
    @pytest.mark.parametrize("rows", ["6:", "2:8", "10:-1", "0:2, 4:", "[1, 3]", "-1"])
    def test_rows_need_no_quotes(self, model, rows):
        """YAML takes 2:8 without them for the number 128, and 6: for a mapping."""
        args = ["--model.decay_rules.some.params=body.weight", f"--model.decay_rules.some.rows={rows}"]
        args += ["--model.decay_rules.some.weight_decay=0.1", "--model.decay_rules.*=0.05"]
        groups = cli(model, *args, run=False).model.decay_groups
        given = yaml.safe_load(rows) if rows.startswith("[") else rows
        rules = {"some": {"params": "body.weight", "rows": given, "weight_decay": 0.1}, "*": 0.05}
        assert groups.rows() == build_decay_groups(LitBase(), rules).rows()

    @pytest.mark.parametrize("model", [LitTyped, LitUntyped])
    def test_rows_and_starts_in_a_file(self, model, tmp_path, capsys):
        some = {"params": "body.weight", "rows": "2:8", "weight_decay": 0.1, "toward": "start"}
        (tmp_path / "config.yaml").write_text(
            yaml.safe_dump({"model": {"decay_rules": {"some": some, "*": 0.05}}}, sort_keys=False)
        )
        groups = cli(model, "-c", tmp_path / "config.yaml", run=False).model.decay_groups
        assert groups.rows() == build_decay_groups(LitBase(), {"some": some, "*": 0.05}).rows()
        with pytest.raises(SystemExit):
            cli(model, "fit", "-c", tmp_path / "config.yaml", "--print_config")
        printed = yaml.safe_load(capsys.readouterr().out)["model"]["decay_rules"]
        assert build_decay_groups(LitBase(), printed).rows() == groups.rows()

    @pytest.mark.parametrize(
        ("override", "rule", "strength"),
        [
            ("head.*.decay_mult=0.5", {"decay_mult": 0.5, "of": "rest"}, "linear 0.05 to 0"),
            ("head.*={decay_mult: 0.2, of: rest}", {"decay_mult": 0.2, "of": "rest"}, "linear 0.02 to 0"),
            ("head.*.weight_decay=0.3", {"weight_decay": 0.3}, "0.3"),
            ("*.start=1", {"decay_mult": 0.1, "of": "rest"}, "linear 0.1 to 0"),
        ],
    )
    def test_a_factor_on_another_group(self, tmp_path, override, rule, strength):
        rules = {"head.*": {"decay_mult": 0.1, "of": "rest"}, "*": {"schedule": "linear", "start": 0.1, "end": 0}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"decay_rules": rules}}, sort_keys=False))
        args = ["-c", tmp_path / "config.yaml", f"--model.decay_rules.{override}"]
        model = cli(LitTyped, *args, run=False).model
        assert model.hparams.decay_rules["head.*"] == rule
        assert model.decay_groups["head"].strength_text == strength

    def test_a_schedule_with_a_wrong_field_is_refused_by_name(self, typed, capsys):
        override = "--model.decay_rules.head.*={schedule: linear, start: 0.1, stop: 0}"
        error = refused(capsys, LitTyped, "fit", "-c", typed, override)
        assert "error: model.decay_rules: decay rule 'head.*': unknown field 'stop' of a schedule" in error

    @pytest.mark.parametrize("strength", [0.1, {"weight_decay": 0.1}])
    def test_another_selector_narrows_a_pattern(self, tmp_path, strength):
        rules = {"head.*": strength, "*": 0.2}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"decay_rules": rules}}, sort_keys=False))
        args = ["-c", tmp_path / "config.yaml", "--model.decay_rules.head.*.max_ndim=1"]
        groups = cli(LitTyped, *args, run=False).model.decay_groups
        assert list(groups[0].params) == ["head.bias"]

    @pytest.mark.parametrize("class_path", [False, True])
    def test_rules_that_are_given_hold_in_a_resumed_run(self, tmp_path, class_path):
        def config(name, rules):
            arguments = {"lr": 0.125, "decay_rules": rules}
            model = {"class_path": "cli_run.LitTyped", "init_args": arguments} if class_path else arguments
            (tmp_path / name).write_text(yaml.safe_dump({"model": model}, sort_keys=False))
            return ["-c", tmp_path / name]

        def fit(*args):
            quiet = ["--trainer.logger=False", "--trainer.enable_progress_bar=False", "--trainer.accelerator=cpu"]
            options = {"subclass_mode_model": True} if class_path else {}
            kind = LitBase if class_path else LitTyped
            return cli(kind, "fit", *args, *quiet, "--trainer.enable_checkpointing=False", **options)

        first = fit(*config("a.yaml", {"*": 0.1}), "--trainer.max_epochs=1")
        first.trainer.save_checkpoint(tmp_path / "a.ckpt")
        more = config("b.yaml", {"*.bias": 0.0, "*": 0.5})
        second = fit(*more, "--ckpt_path", tmp_path / "a.ckpt", "--trainer.max_epochs=2")
        (optimizer,) = second.trainer.optimizers
        assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {"bias": 0.0, "rest": 0.5}

    def test_also_in_a_file_and_for_any_subclass(self, tmp_path, capsys):
        init_args = {"decay_rules": {"*": {"weight_deacy": 1}}}
        config = {"model": {"class_path": "cli_run.LitTyped", "init_args": init_args}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        error = refused(capsys, LitBase, "fit", "-c", tmp_path / "config.yaml", subclass_mode_model=True)
        assert "model.init_args.decay_rules: decay rule '*': unknown field 'weight_deacy'" in error

    def test_a_later_file_brings_rules_of_its_own(self, tmp_path, typed):
        (tmp_path / "later.yaml").write_text("model: {decay_rules: {'*': 0.7}}\n")
        model = cli(LitTyped, "-c", typed, "-c", tmp_path / "later.yaml", run=False).model
        assert model.hparams.decay_rules == {"*": 0.7}

    @pytest.mark.parametrize("argument", ["--model.decay_rules", "--model.init_args.decay_rules"])
    def test_any_subclass_of_a_class(self, tmp_path, argument):
        init_args = yaml.safe_load(TYPED)["model"]
        config = {"model": {"class_path": "cli_run.LitTyped", "init_args": init_args}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        args = ["-c", tmp_path / "config.yaml", f"{argument}.head.*", 0.2, f"{argument}.no_decay.params", "[body.*]"]
        model = cli(LitBase, *args, subclass_mode_model=True, run=False).model
        assert model.hparams.decay_rules == {
            "no_decay": {"params": ["body.*"], "weight_decay": 0},
            "head.*": 0.2,
            "*": 0.05,
        }

    @pytest.mark.parametrize("args", [["--model", "LitClassRules"], []])
    def test_rules_of_the_class_are_the_default_and_change_one_by_one(self, args):
        options = {"subclass_mode_model": True, "run": False} if args else {"run": False}
        base = LitBase if args else LitClassRules
        assert cli(base, *args, **options).model.hparams.decay_rules == RULES
        changed = cli(base, *args, "--model.decay_rules.head.*", 0.2, **options).model
        assert changed.hparams.decay_rules == {**RULES, "head.*": 0.2}
        assert list(changed.hparams.decay_rules) == list(RULES)

    def test_rules_of_the_class_that_hold_code(self, capsys):
        class LitClass(LitTyped):
            decay_rules = {"norm": DecayRule(0.0, modules=nn.LayerNorm), "*": 0.1}

        class LitPredicate(LitTyped):
            decay_rules = {"small": DecayRule(0.0, where=lambda n, p, m: p.numel() < 20), "*": 0.1}

        assert members(cli(LitClass, run=False).model.decay_groups)["norm"] == ["norm.weight", "norm.bias"]
        changed = cli(LitClass, "--model.decay_rules.norm", 0.3, run=False).model.decay_groups
        assert members(changed)["norm"] == ["norm.weight", "norm.bias"]
        assert changed[0].strength_text == "0.3"

        assert list(members(cli(LitPredicate, run=False).model.decay_groups)) == ["small", "rest"]
        error = refused(capsys, LitPredicate, "--model.decay_rules.*", 0.3, run=False)
        assert "model.decay_rules: decay rule 'small': where must be a function" in error
        assert "pass the rules with the function again, in code" in error

    @pytest.mark.parametrize(
        ("overrides", "rules"),
        [
            # A rule with fields keeps them; one strength takes the place of the other.
            (["head", 0.2], {"head": {"params": "head.*", "weight_decay": 0.2}, "*": 0.1}),
            (["head.decay_mult", 2], {"head": {"params": "head.*", "decay_mult": 2}, "*": 0.1}),
            (
                ["head", "{params: [body.*], weight_decay: 1}"],
                {"head": {"params": ["body.*"], "weight_decay": 1}, "*": 0.1},
            ),
            # A strength alone becomes a rule with fields.
            (["*.group", "all"], {"head": HEAD, "*": {"weight_decay": 0.1, "group": "all"}}),
            (["*.options.lr", "1e-4"], {"head": HEAD, "*": {"weight_decay": 0.1, "options": {"lr": 1e-4}}}),
            # Rules that are not there yet come last.
            (["body.bias", 0], {"head": HEAD, "*": 0.1, "body.bias": 0}),
            (
                ["b.params", "*.bias", "b.weight_decay", 0.0],
                {"head": HEAD, "*": 0.1, "b": {"params": "*.bias", "weight_decay": 0.0}},
            ),
        ],
    )
    def test_what_a_change_of_one_rule_means(self, tmp_path, overrides, rules):
        (tmp_path / "rules.yaml").write_text(
            yaml.safe_dump({"model": {"decay_rules": {"head": HEAD, "*": 0.1}}}, sort_keys=False)
        )
        pairs = zip(overrides[::2], overrides[1::2])
        args = [f"--model.decay_rules.{key}={value}" for key, value in pairs]
        model = cli(LitTyped, "-c", tmp_path / "rules.yaml", *args, run=False).model
        assert list(model.hparams.decay_rules.items()) == list(rules.items())

    def test_all_rules_at_once(self):
        args = ["--model.decay_rules", '{"*": 0.3}', "--model.decay_rules.*.options.lr", "1e-4"]
        (group,) = cli(LitClassRules, *args, run=False).model.configure_optimizers().param_groups
        assert (group["name"], group["weight_decay"], group["lr"]) == ("rest", 0.3, 1e-4)

    def test_an_argument_without_a_type(self):
        class LitUntyped(LitTyped):
            def __init__(self, decay_rules=None):
                super().__init__(decay_rules=decay_rules)
                self.save_hyperparameters()

        args = ["--model.decay_rules.*.bias", "0", "--model.decay_rules.*", "1e-1"]
        assert cli(LitUntyped, *args, run=False).model.hparams.decay_rules == {"*.bias": 0, "*": 0.1}

    def test_rules_in_a_list_change_only_as_a_whole(self, capsys):
        class LitList(LitTyped):
            def __init__(self, decay_rules: list[dict[str, Any]]):
                super().__init__(decay_rules=decay_rules)
                self.save_hyperparameters()

        rules = '[{"weight_decay": 0.1}]'
        assert cli(LitList, "--model.decay_rules", rules, run=False).model.hparams.decay_rules == [
            {"weight_decay": 0.1}
        ]
        error = refused(capsys, LitList, "--model.decay_rules", rules, "--model.decay_rules.*", 0.2, run=False)
        assert "rule '*' cannot be changed alone: these rules are a list, [{'weight_decay': 0.1}]" in error


class TestPresets:
    """By name, with any annotation of the argument."""

    @pytest.mark.parametrize("annotation", [None, dict, dict[str, Any] | None, Any, DecayRules, DecayRules | None])
    @pytest.mark.parametrize(
        ("file", "flags", "arguments"),
        [
            ("timm", [], {}),
            (None, ["=timm"], {}),
            (None, [".preset=timm", ".weight_decay=0.05"], {"weight_decay": 0.05}),
            (None, [".weight_decay=0.05", ".preset=timm"], {"weight_decay": 0.05}),
            ("timm", [".weight_decay=0.05", ".keywords=true"], {"weight_decay": 0.05, "keywords": True}),
            (None, ["=timm", ".weight_decay=5e-2"], {"weight_decay": 0.05}),
        ],
    )
    def test_in_a_file_and_on_the_command_line(self, tmp_path, annotation, file, flags, arguments):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {} if file is None else {"decay_rules": file}}))
        flags = [f"--model.decay_rules{flag}" for flag in flags]
        model = cli(with_annotation(annotation), "-c", tmp_path / "config.yaml", *flags, run=False).model
        rules = model.hparams.decay_rules
        assert rules == {"preset": "timm", **arguments} or (rules == "timm" and not arguments)
        strength = f"{arguments['weight_decay']:g}" if arguments else "optimizer's"
        assert [group.strength_text for group in model.decay_groups] == ["0", strength]

    def test_in_the_place_of_rules_of_the_class(self, capsys):
        args = ["--model.decay_rules=timm", "--model.decay_rules.weight_decay=0.05"]
        assert cli(LitClassRules, *args, run=False).model.decay_groups.names == ["no_decay", "decay"]
        error = refused(capsys, LitClassRules, "--model.decay_rules.preset=timm", run=False)
        assert "model.decay_rules: preset 'timm' has no argument '*.bias'" in error
        assert "'timm' alone takes the place of all rules" in error

    def test_where_rules_are_a_list(self):
        model = cli(with_annotation(list[Any] | None), "--model.decay_rules=timm", run=False).model
        assert model.hparams.decay_rules == [{"preset": "timm"}]

    def test_of_any_subclass(self, tmp_path):
        config = {"model": {"class_path": "cli_run.LitTyped", "init_args": {"decay_rules": "timm"}}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        model = cli(LitBase, "-c", tmp_path / "config.yaml", subclass_mode_model=True, run=False).model
        assert model.decay_groups.names == ["no_decay", "default"]

    @pytest.mark.parametrize("annotation", [None, dict, DecayRules])
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["=tinm"], "unknown preset 'tinm'; did you mean 'timm'?"),
            (
                ["=timm", ".weight_deacy=1"],
                "preset 'timm' has no argument 'weight_deacy'; did you mean",
            ),
            (["=timm", ".weight_decay=-1"], "weight_decay must be a finite number of at least 0, got -1"),
        ],
    )
    def test_a_wrong_one_is_refused_by_name(self, capsys, annotation, flags, message):
        flags = [f"--model.decay_rules{flag}" for flag in flags]
        error = refused(capsys, with_annotation(annotation), *flags, run=False)
        assert "error: model.decay_rules: " in error
        assert message in error

    @pytest.mark.parametrize("text", ["true", "nan", "0.1", "not a name"])
    def test_other_text_is_no_name(self, capsys, text):
        error = refused(capsys, with_annotation(dict), f"--model.decay_rules={text}", run=False)
        assert 'Parser key "model.decay_rules"' in error


class LitLr(LitTyped):
    """With lr rules as an argument, and of the class."""

    lr_rules = {"head.*": {"lr_mult": 2.0}}

    def __init__(self, lr: float = 1e-3, decay_rules: dict[str, Any] | None = None, lr_rules: Any = None) -> None:
        super().__init__(lr, decay_rules)
        self.save_hyperparameters()


class TestLrRules:
    """As decay rules, beside them."""

    def lrs(self, *args, model=LitLr):
        result = cli(model, "fit", "--model.decay_rules", '{"*.bias": 0.0, "*": 0.1}', "--model.lr", 0.5, *args)
        return {group["name"]: group["lr"] for group in groups_in_force(result.trainer.optimizers[0])}

    def test_in_a_file(self, tmp_path):
        (tmp_path / "lr.yaml").write_text("model: {lr_rules: {head.*: 1e-2, body: {params: body.*, lr_mult: 1e-1}}}\n")
        assert self.lrs("-c", tmp_path / "lr.yaml") == {
            **{"head.bias": 0.01, "body.bias": 0.05, "bias": 0.5},
            **{"head.rest": 0.01, "body.rest": 0.05, "rest": 0.5},
        }

    def test_single_ones_of_the_class_change(self):
        assert self.lrs()["head.rest"] == 1.0
        assert self.lrs("--model.lr_rules.head.*.lr_mult=0.5")["head.rest"] == 0.25
        assert self.lrs("--model.lr_rules.head.*=0.125")["head.rest"] == 0.125
        found = self.lrs("--model.lr_rules.body.lr_mult=4", "--model.lr_rules.body.params=body.*")
        assert (found["head.rest"], found["body.rest"], found["rest"]) == (1.0, 2.0, 0.5)

    def test_presets(self):
        class Deep(LitLr):
            def __init__(self, lr: float = 1e-3, decay_rules: Any = None, lr_rules: Any = None) -> None:
                super().__init__(lr, decay_rules)
                self.save_hyperparameters()
                self.blocks = nn.ModuleList([self.body])

        given = ["--model.lr_rules=layerwise", "--model.lr_rules.depths=1", "--model.lr_rules.layer_decay=0.5"]
        with pytest.raises(ValueError, match=r"lr rule 2 .* takes nothing"):
            self.lrs(*given)
        assert self.lrs(*given, model=Deep) == {
            **{"layer_0.bias": 0.25, "bias": 0.5},
            **{"layer_0.rest": 0.25, "rest": 0.5},
        }

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("head.*=-1", "lr rule 'head.*': lr must be a finite number of at least 0, got -1"),
            ("head.*.lr_mul=1", "lr rule 'head.*': unknown field 'lr_mul'; did you mean 'lr_mult'?"),
            ("head.*.weight_decay=1", "weight decay goes into decay_rules"),
        ],
    )
    def test_a_wrong_value_is_refused_by_name(self, capsys, override, message):
        error = refused(capsys, LitLr, "fit", f"--model.lr_rules.{override}")
        assert "error: model.lr_rules: " in error
        assert message in error

    def test_of_a_callback(self, tmp_path):
        init = '{decay_rules: {"*": 0.3}, lr_rules: {head: {params: head.*, lr_mult: 0.5}}}'
        (tmp_path / "config.yaml").write_text(
            f"trainer: {{callbacks: {{class_path: WeightDecayRules, init_args: {init}}}}}\n"
        )
        result = cli(LitPlain, "fit", "-c", tmp_path / "config.yaml", "--optimizer=SGD", "--optimizer.lr=0.5")
        [optimizer] = result.trainer.optimizers
        assert {group["name"]: group["lr"] for group in groups_in_force(optimizer)} == {"rest": 0.5, "head.rest": 0.25}

    def test_they_hold_over_those_of_a_checkpoint(self, tmp_path):
        first = cli(LitLr, "fit", "--model.decay_rules", '{"*": 0.1}')
        first.trainer.save_checkpoint(tmp_path / "run.ckpt")
        args = ["--ckpt_path", tmp_path / "run.ckpt", "--trainer.max_epochs=2", "--model.lr_rules.head.*.lr_mult=4"]
        result = cli(LitLr, "fit", *args)
        assert {g["name"]: g["lr"] for g in groups_in_force(result.trainer.optimizers[0])}["head.rest"] == 4e-3


class TestCallbacks:
    """By their short names, as Lightning's own."""

    CONFIG = """
trainer:
  callbacks:
  - {class_path: WeightDecayRules, init_args: {decay_rules: {"*.bias": 0.0, "*": 0.3}}}
  - {class_path: WeightDecayMonitor, init_args: {every_n_steps: 2}}
"""
    SGD = ("--optimizer", "SGD", "--optimizer.lr", "0.1")
    FLAGS = ("--trainer.callbacks=WeightDecayRules", "--trainer.callbacks.decay_rules")

    @staticmethod
    def logged(*args, **options):
        metrics = cli(LitPlain, "fit", *args, *TestCallbacks.SGD, **options).trainer.callback_metrics
        return {key: value.item() for key, value in metrics.items() if key.endswith("weight_decay")}

    @pytest.mark.parametrize("cls", [WeightDecayCLI, LightningCLI])
    def test_in_a_file(self, tmp_path, cls):
        (tmp_path / "config.yaml").write_text(self.CONFIG)
        logged = self.logged("-c", tmp_path / "config.yaml", cls=cls)
        assert logged == {"decay/bias/weight_decay": 0.0, "decay/rest/weight_decay": 0.3}

    @pytest.mark.parametrize("cls", [WeightDecayCLI, LightningCLI])
    def test_on_the_command_line(self, cls):
        rules, argument = self.FLAGS
        args = [rules, argument + '={"*.bias": 0.0, "*": 0.3}', "--trainer.callbacks+=WeightDecayMonitor"]
        assert self.logged(*args, cls=cls) == {"decay/bias/weight_decay": 0.0, "decay/rest/weight_decay": 0.3}

    def test_single_rules_and_presets_on_the_command_line(self):
        rules, argument = self.FLAGS
        monitor = "--trainer.callbacks+=WeightDecayMonitor"
        given = argument + '={"head.*": 0.1, "*": 0.3}'
        logged = self.logged(rules, given, f"{argument}.head.*=0.2", f"{argument}.head.*.min_ndim=2", monitor)
        assert logged == {"decay/head/weight_decay": 0.2, "decay/rest/weight_decay": 0.3}

        logged = self.logged(rules, f"{argument}=timm", f"{argument}.weight_decay=0.2", monitor)
        assert logged == {"decay/no_decay/weight_decay": 0.0, "decay/decay/weight_decay": 0.2}

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ({"*.bias": -1.0}, "decay rule '*.bias': weight_decay must be a finite number of at least 0, got -1.0"),
            ({"head": {"parms": "head.*"}}, "decay rule 'head': unknown field 'parms'; did you mean 'params'?"),
            ("tinm", "unknown preset 'tinm'; did you mean 'timm'?"),
        ],
    )
    @pytest.mark.parametrize("alone", [True, False])
    def test_a_wrong_rule_is_refused_by_name(self, tmp_path, capsys, rules, message, alone):
        callback = {"class_path": "WeightDecayRules", "init_args": {"decay_rules": rules}}
        callbacks = callback if alone else [{"class_path": "WeightDecayMonitor"}, callback]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
        error = refused(capsys, LitPlain, "fit", "-c", tmp_path / "config.yaml", *self.SGD)
        assert f"error: trainer.callbacks: WeightDecayRules.decay_rules: {message}" in error

    def test_a_wrong_rule_is_named_by_lightning_cli_too(self):
        rules, argument = self.FLAGS
        with pytest.raises(ValueError, match=r"decay rule '\*\.bias': weight_decay must be a finite number"):
            self.logged(rules, argument + '={"*.bias": -1.0}', cls=LightningCLI)

    @pytest.mark.parametrize("cls", [WeightDecayCLI, LightningCLI])
    def test_a_rule_that_takes_nothing_ends_the_fit_before_it_trains(self, cls):
        rules, argument = self.FLAGS
        with pytest.raises(ValueError, match=r"decay rule 1 '\*\.bais' takes nothing"):
            self.logged(rules, argument + '={"*.bais": 0.0}', cls=cls)

    def test_with_a_key_of_its_own(self, capsys):
        class CLI(WeightDecayCLI):
            def add_arguments_to_parser(self, parser):
                parser.add_lightning_class_args(WeightDecayRules, "rules")

        args = ['--rules.decay_rules={"*": 0.3}', "--rules.decay_rules.head.*"]
        (optimizer,) = cli(LitPlain, "fit", *self.SGD, args[0], cls=CLI).trainer.optimizers
        assert [group["weight_decay"] for group in groups_in_force(optimizer)] == [0.3]
        error = refused(capsys, LitPlain, "fit", *self.SGD, *args, "-1", cls=CLI)
        assert "error: rules.decay_rules: decay rule 'head.*': weight_decay must be" in error

    @pytest.mark.parametrize(
        "imports",
        [
            "from lightning.pytorch.cli import LightningCLI; import lightning_regdecay",
            "from lightning_regdecay import WeightDecayMixin; from lightning.pytorch.cli import LightningCLI",
            "from lightning_regdecay import WeightDecayRules; from lightning.pytorch.cli import LightningCLI",
        ],
    )
    def test_whatever_of_the_package_a_program_imports(self, tmp_path, imports):
        code = f"""
{imports}
from lightning.pytorch.demos.boring_classes import BoringModel
rules = ["--trainer.callbacks=WeightDecayRules", "--trainer.callbacks.decay_rules=timm"]
args = [*rules, "--trainer.callbacks+=WeightDecayMonitor", "--trainer.accelerator=cpu", "--trainer.logger=false"]
cli = LightningCLI(BoringModel, save_config_callback=None, run=False, args=args)
print(*(type(callback).__name__ for callback in cli.trainer.callbacks[:2]))
"""
        output = run_python("-c", code, cwd=tmp_path, timeout=120)
        assert output.splitlines()[-1] == "WeightDecayRules WeightDecayMonitor"


class TestOptimizerAsAnArgument:
    def test_a_run_with_a_file_and_overrides(self, tmp_path):
        config = """
model:
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}
  lr_scheduler: {class_path: lightning.pytorch.cli.ReduceLROnPlateau, init_args: {monitor: train_loss}}
"""
        (tmp_path / "config.yaml").write_text(config)
        args = ["-c", "config.yaml", "--model.optimizer.lr", "0.25", "--model.lr_scheduler.monitor", "val_loss"]
        result = run("WeightDecayCLI", "LitCallables", "fit", *args, cwd=tmp_path)
        assert result["optimizer"] == "SGD"
        assert result["groups"] == {
            "bias": [0, 0.25],
            "norm": [0.01, 0.25],
            "head": [0.001, 0.25],
            "rest": [0.05, 0.25],
        }
        assert result["lr_schedulers"] == [["ReduceLROnPlateau", "val_loss"]]

    def test_under_lightning_cli_too(self):
        result = report(
            cli(LitCallables, "fit", "--model.optimizer", "SGD", "--model.optimizer.lr", 0.1, cls=LightningCLI).trainer
        )
        assert (result["optimizer"], list(result["groups"])) == ("SGD", ["bias", "norm", "head", "rest"])


class TestChosenOptimizer:
    """By ``--optimizer`` and ``--lr_scheduler``."""

    ADAM = ("--optimizer", "Adam", "--optimizer.lr", "0.5")

    def test_a_run_with_a_file_and_overrides(self, tmp_path):
        config = """
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.1, weight_decay: 0.4}}
lr_scheduler: {class_path: lightning.pytorch.cli.ReduceLROnPlateau, init_args: {monitor: train_loss}}
model: {decay_rules: {"*.bias": 0, "head": {params: head.*, decay_mult: 0.5}}}
"""
        (tmp_path / "config.yaml").write_text(config)
        args = ["-c", "config.yaml", "--optimizer.lr", "0.25", "--lr_scheduler.monitor", "val_loss"]
        result = run("WeightDecayCLI", "LitTyped", "fit", *args, cwd=tmp_path)
        assert result["optimizer"] == "AdamW"
        assert result["groups"] == {"bias": [0, 0.25], "head": [0.2, 0.25], "default": [0.4, 0.25]}
        assert result["lr_schedulers"] == [["ReduceLROnPlateau", "val_loss"]]

    def test_under_lightning_cli_the_rules_are_in_force_in_its_optimizer(self):
        command = cli(LitClassRules, "fit", "--optimizer", "SGD", "--optimizer.lr", "0.1", cls=LightningCLI)
        (optimizer,) = command.trainer.optimizers
        assert type(optimizer) is torch.optim.SGD
        assert len(optimizer.param_groups) == 1
        found = {group["name"]: group["weight_decay"] for group in groups_in_force(optimizer)}
        assert found == {"bias": 0.0, "norm": 0.01, "head": 1e-3, "rest": 0.05}

    @pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
    def test_lightning_cli_may_evaluate(self, subcommand):
        class Lit(LitRules):
            def test_step(self, batch, batch_idx):
                self.validation_step(batch, batch_idx)

            def predict_step(self, batch, batch_idx):
                return batch

        class Data(Digits):
            test_dataloader = predict_dataloader = Digits.val_dataloader

        cli(Lit, subcommand, *self.ADAM, datamodule_class=Data, cls=LightningCLI)

    def test_the_same_training_as_with_build_optimizer(self):
        class LitAdam(LitRules):
            def build_optimizer(self, param_groups):
                return torch.optim.Adam(param_groups, lr=0.5)

        chosen = cli(LitRules, "fit", *self.ADAM).model
        built = cli(LitAdam, "fit").model
        assert all(map(torch.equal, chosen.parameters(), built.parameters()))

    def test_a_model_without_the_mixin_is_as_under_lightning_cli(self):
        args = ["fit", *self.ADAM, "--lr_scheduler", "ConstantLR"]
        ours, lightnings = (cli(LitPlain, *args, cls=cls) for cls in (WeightDecayCLI, LightningCLI))
        assert report(ours.trainer) == report(lightnings.trainer)
        assert all(map(torch.equal, ours.model.parameters(), lightnings.model.parameters()))

    def test_a_fixed_class_with_a_scheduler(self):
        class CLI(WeightDecayCLI):
            def add_arguments_to_parser(self, parser):
                parser.add_optimizer_args(torch.optim.SGD)
                parser.add_lr_scheduler_args(torch.optim.lr_scheduler.ExponentialLR)

        args = ["--optimizer.lr", 0.5, "--lr_scheduler.gamma", 0.5]
        result = report(cli(LitRules, "fit", *args, cls=CLI).trainer)
        assert (result["optimizer"], result["groups"]["head"]) == ("SGD", [0.001, 0.25])
        assert result["lr_schedulers"] == [["ExponentialLR", None]]

    def test_a_scheduler_alone_goes_with_the_models_optimizer(self):
        result = report(cli(LitRules, "fit", "--lr_scheduler", "ConstantLR").trainer)
        assert (result["optimizer"], result["lr_schedulers"]) == ("AdamW", [["ConstantLR", None]])

    def test_an_optimizer_alone_goes_with_the_models_scheduler(self):
        class Lit(LitRules):
            def build_lr_scheduler(self, optimizer):
                scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
                return {"scheduler": scheduler, "interval": "step"}

        (scheduler,) = cli(Lit, "fit", *self.ADAM).trainer.lr_scheduler_configs
        assert (scheduler.interval, type(scheduler.scheduler.optimizer)) == ("step", torch.optim.Adam)

    def test_the_choice_comes_before_the_models_own_with_a_warning(self):
        class Lit(LitRules):
            def build_optimizer(self, param_groups):
                raise AssertionError

            def configure_optimizers(self):
                raise AssertionError

        with pytest.warns(UserWarning, match="is not used") as caught:
            result = report(cli(Lit, "fit", *self.ADAM).trainer)
        messages = [str(w.message) for w in caught]
        for name in ("build_optimizer", "configure_optimizers"):
            assert f"Lit.{name} is not used: the configuration has chosen Adam" in messages
        assert result["groups"]["head"] == [0.001, 0.5]

        with pytest.warns(UserWarning, match=r"LitCallables\.optimizer is not used: the configuration has chosen Adam"):
            result = report(cli(LitCallables, "fit", *self.ADAM).trainer)
        assert (result["optimizer"], result["lr_schedulers"]) == ("Adam", [["ConstantLR", None]])

    def test_the_configuration_may_still_be_customized_as_in_lightning(self):
        class CLI(WeightDecayCLI):
            @staticmethod
            def configure_optimizers(lightning_module, optimizer, lr_scheduler=None):
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}

        trainer = cli(LitRules, "fit", *self.ADAM, "--lr_scheduler", "ConstantLR", cls=CLI).trainer
        assert trainer.lr_scheduler_configs[0].interval == "step"
        assert list(report(trainer)["groups"]) == ["bias", "norm", "head", "rest"]

    def test_more_than_one_optimizer_is_lightnings_error(self):
        class CLI(WeightDecayCLI):
            def add_arguments_to_parser(self, parser):
                parser.add_optimizer_args(torch.optim.SGD, "first")
                parser.add_optimizer_args(torch.optim.SGD, "second")

        with pytest.raises(Exception, match="expects at most one optimizer"):
            cli(LitRules, "fit", "--first.lr", 1, "--second.lr", 1, cls=CLI)

    def test_an_optimizer_without_weight_decay_is_an_error(self):
        with pytest.raises(ValueError, match="Rprop knows no weight decay"):
            cli(LitRules, "fit", "--optimizer", "Rprop")

    def test_a_copy_of_the_model_has_an_optimizer_of_its_own(self):
        model = cli(LitRules, "fit", *self.ADAM).model
        copied = copy.deepcopy(model)
        mine = {p for group in copied.configure_optimizers().param_groups for p in group["params"]}
        assert mine == set(copied.parameters())

    def test_processes_can_be_spawned(self):
        made = cli(LitClassRules, *self.ADAM, "--lr_scheduler", "ConstantLR", run=False)
        parser, model = pickle.loads(pickle.dumps((made.parser, made.model)))
        assert parser.dump(made.config) == made.parser.dump(made.config)
        config = model.configure_optimizers()
        assert [type(part[0]) for part in config] == [torch.optim.Adam, torch.optim.lr_scheduler.ConstantLR]

    def test_layers_that_are_made_when_the_run_starts(self):
        class Lit(LitRules):
            def configure_model(self):
                self.late = nn.Linear(2, 2)

        groups = report(cli(Lit, "fit", *self.ADAM).trainer)["groups"]
        assert groups["rest"] == [0.05, 0.5]

    def test_nothing_chosen_leaves_the_model_as_it_is(self):
        assert "configure_optimizers" not in vars(cli(LitRules, run=False).model)


class TestGroups:
    def test_needs_what_fit_needs_but_makes_the_model_only(self, tmp_path, typed):
        trainer = {"accelerator": "gpu", "devices": 8, "strategy": "fsdp", "logger": True}
        trainer["callbacks"] = [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "checkpoints"}}]
        config = {"trainer": trainer, "data": {"batch_size": 8}, "ckpt_path": None, "optimizer": {"class_path": "Adam"}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        before = sorted(tmp_path.iterdir())
        args = [
            "groups",
            "-c",
            typed,
            "-c",
            "run.yaml",
            "--model.decay_rules.head.*",
            "0.2",
            "--parameter",
            "head.bias",
        ]
        output = run_python(PROGRAM, "WeightDecayCLI", "LitTyped", *args, cwd=tmp_path, timeout=120)
        table = """
group     rule             tensors  parameters  weight_decay           lr
no_decay  *.bias | *norm*        4          58             0  optimizer's
head      head.*                 1         160           0.2  optimizer's
rest      *                      1       1,024          0.05  optimizer's
total                            6       1,242

head.bias (1 dimensions, in Linear) is in group 'no_decay', weight_decay 0
  rule 1 '*.bias | *norm*' takes it
"""
        assert output.endswith(table.lstrip())
        assert "data made" not in output
        assert sorted(tmp_path.iterdir()) == before

    def test_the_table_is_that_of_the_model(self, capsys):
        cli(LitRules, "groups")
        assert capsys.readouterr().out == f"{LitRules().decay_groups}\n"

    def test_an_unknown_parameter(self, capsys):
        error = refused(capsys, LitRules, "groups", "--parameter", "head.weihgt")
        assert error.endswith("error: the model has no parameter 'head.weihgt'; nearest: 'head.weight', 'head.bias'\n")

    def test_a_model_without_the_mixin(self, capsys):
        error = refused(capsys, LitPlain, "groups")
        assert error.endswith(
            "error: LitPlain has no decay groups: put WeightDecayMixin before LightningModule in its bases\n"
        )

    def test_rules_that_do_not_fit_the_model(self, capsys):
        error = refused(capsys, LitTyped, "groups", "--model.decay_rules.*.bais", 0)
        assert "error: decay rule 1 '*.bais' takes nothing: no parameter name matches '*.bais'" in error

    def test_a_model_made_when_the_run_starts(self, capsys):
        class LitLate(WeightDecayMixin, L.LightningModule):
            decay_rules = {"*": 0.1}

            def configure_model(self):
                self.late = nn.Linear(2, 2)

        error = refused(capsys, LitLate, "groups")
        assert (
            "error: LitLate has nothing to train: it has no parameters\nLitLate.configure_model is not called" in error
        )

        class LitPartlyLate(LitRules, LitLate):
            pass

        with pytest.warns(UserWarning, match=r"LitPartlyLate\.configure_model is not called here"):
            cli(LitPartlyLate, "groups")
        assert "rest" in capsys.readouterr().out

    def test_what_the_model_takes_from_the_data_is_made(self, capsys):
        class Lit(LitRules):
            def __init__(self, width: int):
                super().__init__()
                self.extra = nn.Linear(width, 1)

        class CLI(WeightDecayCLI):
            def add_arguments_to_parser(self, parser):
                parser.link_arguments("data.batch_size", "model.width", apply_on="instantiate")

        cli(Lit, "groups", "--data.batch_size", 7, "--parameter", "extra.weight", datamodule_class=Digits, cls=CLI)
        output = capsys.readouterr().out
        assert "data made" in output
        assert f"{LitRules().decay_groups[-1].numel + 7:,}" in output

    def test_a_callback_and_a_parser_of_the_user(self, capsys):
        class Parser(LightningArgumentParser):
            pass

        class CLI(WeightDecayCLI):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)

            def init_parser(self, **kwargs):
                self.parser_class = Parser  # an argument of LightningCLI from 2.6 on
                return super().init_parser(**kwargs)

            def add_arguments_to_parser(self, parser):
                parser.add_lightning_class_args(WeightDecayMonitor, "monitor")

        args = ["--monitor.every_n_steps", 1, "--model.decay_rules.head.*", 0.2]
        cli(LitClassRules, "groups", *args, cls=CLI)
        assert " 0.2 " in capsys.readouterr().out
        fitted = cli(LitClassRules, "fit", *args, cls=CLI)
        assert "decay/head/l2_norm" in fitted.trainer.callback_metrics

    def test_default_files_of_fit_are_read(self, typed, capsys):
        cli(LitTyped, "groups", parser_kwargs={"fit": {"default_config_files": [str(typed)]}})
        assert "no_decay" in capsys.readouterr().out

    def test_code_after_the_model_is_made_counts(self, capsys):
        class CLI(WeightDecayCLI):
            def after_instantiate_classes(self):
                assert self.trainer is None
                self.model.norm.requires_grad_(False)

        with pytest.warns(UserWarning, match=r"'\*norm\*' takes frozen parameters only"):
            cli(LitRules, "groups", cls=CLI)
        assert "norm  " not in capsys.readouterr().out


def test_nothing_deprecated_is_called(tmp_path, typed, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "all")
    args = ["-c", typed, "--model.decay_rules.head.*=0.2", "--trainer.callbacks=WeightDecayMonitor"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = cli(LitTyped, "fit", *args, *TestChosenOptimizer.ADAM, "--lr_scheduler=ConstantLR").trainer
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        cli(LitTyped, "validate", *args, "--ckpt_path", tmp_path / "a.ckpt", datamodule_class=Digits)
        cli(LitTyped, "groups", *args, "--parameter=head.bias")
        with pytest.raises(SystemExit):
            cli(LitTyped, "fit", *args, "--print_config")
    ours = str(Path(lightning_regdecay.__file__).parent)
    found = [one for one in caught if issubclass(one.category, DeprecationWarning) and one.filename.startswith(ours)]
    assert [str(one.message) for one in found] == []


def test_without_jsonargparse_the_message_says_what_to_install(tmp_path):
    code = """
import importlib.metadata
import sys
installed = importlib.metadata.Distribution.from_name

def without_jsonargparse(name):
    if name == "jsonargparse":
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)

importlib.metadata.Distribution.from_name = without_jsonargparse
sys.modules["jsonargparse"] = None
import lightning as L
from lightning_regdecay.cli import WeightDecayCLI
try:
    WeightDecayCLI(L.LightningModule)
except ModuleNotFoundError as error:
    print(error)
"""
    output = run_python("-c", code, cwd=tmp_path, timeout=120)
    assert "pip install -U 'jsonargparse[signatures]" in output.splitlines()[-1]
