"""The README and the examples do what they say."""

from __future__ import annotations

import doctest
import functools
import json
import logging
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import FSDP2_RUNS_ON_CPU, run_python
from lightning_utilities.core import rank_zero

import lightning_regdecay

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


class Log(logging.Handler):
    """Keeps what is logged for the user."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    """What the Python blocks of the README define, run in order as one program."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        names: dict[str, object] = {}
        log = Log()
        rank_zero.log.addHandler(log)  # where Lightning logs what is for the user
        for block in blocks("python"):
            exec(block, names)
        rank_zero.log.removeHandler(log)
        return {**names, "log": log.lines}


def test_the_python_blocks_run(namespace):
    assert namespace["monitor"].history
    config = namespace["LitSGD"]().configure_optimizers()
    assert config["lr_scheduler"]["interval"] == "step"
    optimizer = namespace["LitChoice"]().configure_optimizers()
    assert [group["name"] for group in optimizer.param_groups] == ["bias", "norm", "head", "rest"]


def test_the_printed_table_is_the_real_one(namespace):
    assert blocks("text")[0].strip() == str(namespace["LitModel"]().decay_groups)


def test_the_sessions_show_what_really_happens(namespace):
    sessions = blocks("pycon")
    assert len(sessions) >= 3
    names = dict(namespace)
    for number, session in enumerate(sessions):
        test = doctest.DocTestParser().get_doctest(session, names, f"README session {number}", "README.md", 0)
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(test, clear_globs=False)
        names.update(test.globs)
        assert runner.summarize(verbose=False).failed == 0


def test_the_yaml_is_rules(namespace):
    import yaml

    all_rules = [config["decay_rules"] for config in map(yaml.safe_load, blocks("yaml")) if "decay_rules" in config]
    model = namespace["LitModel"]()
    groups = [[group.name for group in lightning_regdecay.build_decay_groups(model, rules)] for rules in all_rules]
    assert groups == [["no_decay", "head", "rest"], ["bias", "head", "rest"], ["head", "no_decay", "decay"]]


def test_resumed_runs_log_what_is_shown(namespace):
    shown = [line for text in blocks("text") if "(checkpoint)" in text for line in text.splitlines()]
    assert len(shown) == 4
    assert [line for line in namespace["log"] if line in shown] == shown


def test_the_schedule_goes_where_it_should(namespace):
    strengths = namespace["strengths"]
    assert strengths[0] == 0.04
    assert strengths[50] == pytest.approx(0.22)
    assert 0.399 < strengths[-1] < 0.4


def test_the_command_line(tmp_path):
    # The program, its configuration and its commands go by py, yml and sh; the blocks above are run in other ways.
    (program,), (config,), (commands,) = blocks("py"), blocks("yml"), blocks("sh")
    (tmp_path / "train.py").write_text(program)
    (tmp_path / "config.yaml").write_text(config)
    groups, *fits = commands.splitlines()
    run = functools.partial(subprocess.run, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    done = run(groups.replace("python", shlex.quote(sys.executable), 1))
    assert done.stdout in blocks("text"), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "train.py"]

    assert len(fits) == 2
    for fit in fits:
        done = run(fit.replace("python", shlex.quote(sys.executable), 1) + " --trainer.accelerator cpu")
        assert done.returncode == 0, done.stderr
    changed, unchanged = ((tmp_path / f"lightning_logs/version_{i}/config.yaml").read_text() for i in range(2))
    assert "head.*: 0.01\n" in changed
    assert "class_path: torch.optim.SGD\n" in unchanged


@pytest.mark.parametrize("name", lightning_regdecay.__all__)
def test_every_public_name_is_shown(name):
    assert re.search(rf"\b{name}\b", README)


def test_the_example(tmp_path):
    rules = {"*.bias": 0, "*norm*": 0, "*": "1e-1"}
    output = run_python(
        ROOT / "examples" / "digits.py",
        "--epochs",
        2,
        "--decay-rules",
        json.dumps(rules),
        cwd=tmp_path,
        timeout=120,
        MPLBACKEND="Agg",
    )
    assert re.search(r"^rest +0.1 +\d+\.\d+ +\d+\.\d+$", output, flags=re.MULTILINE)
    assert len(re.findall(r"^test accuracy with .*: +0\.\d+$", output, flags=re.MULTILINE)) == 2
    assert (tmp_path / "decay.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.glob("logs/rules/version_0/events.out.tfevents.*"))
    assert "decay/rest/l2_norm" in (tmp_path / "logs/rules-csv/version_0/metrics.csv").read_text()


@pytest.mark.skipif(not FSDP2_RUNS_ON_CPU, reason="this torch does not run FSDP2 on CPUs")
def test_the_sharded_example(tmp_path):
    example = ROOT / "examples" / "sharded.py"
    output = run_python(example, "--epochs", 1, cwd=tmp_path, timeout=240, may_abort=True)
    rows = re.findall(r"^(\w+) +([\d,]+) of ([\d,]+) +(\S+) +(\S+) +(\S+)$", output, flags=re.MULTILINE)
    assert [row[0] for row in rows] == ["norms", "vectors", "head", "matrices"]
    for _, here, whole, logged, truth, difference in rows:
        assert 0 < int(here.replace(",", "")) < int(whole.replace(",", ""))
        assert float(logged) == pytest.approx(float(truth), rel=1e-6)
        assert float(difference) <= 1e-6


def test_the_example_takes_yaml_from_a_file(tmp_path):
    (tmp_path / "rules.yaml").write_text("head.*: 1e-2\n'*': 0.1\n")
    output = run_python(
        ROOT / "examples" / "digits.py",
        "--epochs",
        1,
        "--decay-rules",
        "rules.yaml",
        cwd=tmp_path,
        timeout=120,
        MPLBACKEND="Agg",
    )
    assert re.search(r"^head +0.01 ", output, flags=re.MULTILINE)


def tuning_tables(output):
    """What examples/tune.py printed of the studies, and the rows of its table by name."""
    studies = re.findall(r"^one λ .* (\d+) trials, (\d+) pruned, best validation PSNR (\S+) dB$", output, re.MULTILINE)
    row = r"^(\S.*?)" + r" +([\d.e+-]+)" * 4 + r" +(\S+) ± (\S+)" * 2 + "$"
    rows = {name: [*map(float, numbers)] for name, *numbers in re.findall(row, output, re.MULTILINE)}
    return studies, rows


def test_the_tuning_example(tmp_path):
    pytest.importorskip("optuna_integration")
    example = ROOT / "examples" / "tune.py"
    options = ("--trials", 6, "--epochs", 2, "--storage", "sqlite:///tune.db", "--picture", "trials.png")
    output = run_python(example, *options, cwd=tmp_path, timeout=240, MPLBACKEND="Agg")
    studies, rows = tuning_tables(output)
    assert [trials for trials, _, _ in studies] == ["6", "6"]
    assert list(rows) == ["AdamW's own", "one λ for all", "one λ per group"]
    assert rows["AdamW's own"][:4] == [0.01] * 4
    assert len(set(rows["one λ for all"][:4])) == 1
    assert len(set(rows["one λ per group"][:4])) == 4
    for *decays, val, val_spread, test, test_spread in rows.values():
        assert all(0.01 <= decay <= 100 for decay in decays)
        assert 10 < val < 20  # one colour everywhere scores 9.8 dB
        assert test == pytest.approx(val, abs=1)
        assert 0 < val_spread < 2
        assert 0 < test_spread < 2
    assert (tmp_path / "trials.png").read_bytes().startswith(b"\x89PNG")

    # The storage holds all trials: nothing is left to search, and what was found is the same.
    again = run_python(example, *options, cwd=tmp_path, timeout=240, MPLBACKEND="Agg")
    assert tuning_tables(again) == (studies, rows)


def test_the_tuning_table_in_the_readme_says_what_the_text_says():
    [output] = [text for text in blocks("text") if "pruned" in text]
    studies, rows = tuning_tables(output)
    assert all(int(pruned) > 0 for _, pruned, _ in studies)
    scores = {name: row[6] for name, row in rows.items()}
    assert scores["AdamW's own"] < scores["one λ for all"] < scores["one λ per group"]


@pytest.mark.parametrize(("threshold", "state", "epochs"), [(1000, "PRUNED", [0]), (-1000, "COMPLETE", [0, 1, 2])])
def test_the_tuning_example_prunes(threshold, state, epochs):
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("optuna_integration")
    tune = runpy.run_path(str(ROOT / "examples" / "tune.py"))
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=threshold))
    study.optimize(lambda trial: tune["objective"](trial, tune["per_group"](trial), 3), n_trials=1)
    [trial] = study.trials
    assert trial.state.name == state
    assert list(trial.intermediate_values) == epochs
