"""The README and the examples do what they say."""

from __future__ import annotations

import ast
import contextlib
import doctest
import functools
import io
import logging
import math
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from helpers import FSDP2_RUNS_ON_CPU, run_python
from lightning_utilities.core import rank_zero

import lightning_regdecay
from lightning_regdecay.rules.forms import parse_rules

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "examples").glob("*.md"))
PAGES = [README, *GUIDES, ROOT / "tests" / "benchmarks" / "README.md"]
OF_RULES, OF_RESUMING, OF_TUNING, OF_THE_COMMAND_LINE = (
    ROOT / "examples" / f"{name}.md" for name in ("rules", "resuming", "tuning", "command-line")
)


def blocks_and_output(page):
    """The Python blocks of a page, each with the text block right after it, None where there is none."""
    found = re.findall(
        r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", page.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    return [(block, shown or None) for block, shown in found]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


class Log(logging.Handler):
    """Keeps what is logged for the user."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """What the Python blocks of each page define, run as one program; those of a guide go on from the README's."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        for page in [README, *GUIDES]:
            names, outputs = dict(found.get(README, {})), []
            log = Log()
            rank_zero.log.addHandler(log)  # where Lightning logs what is for the user
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for block, shown in blocks_and_output(page):
                    with contextlib.redirect_stdout(io.StringIO()) as printed:
                        exec(block, names)
                    if shown is not None and "\nprint(" in block:
                        outputs.append((shown.strip(), printed.getvalue().strip()))
            rank_zero.log.removeHandler(log)
            of_ours = [str(one.message) for one in caught if "lightning_regdecay" in one.filename]
            found[page] = {**names, "log": log.lines, "warnings": of_ours, "outputs": outputs}
    return found


pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_readme_is_read_in_ten_minutes():
    assert len(README.read_text().splitlines()) <= 260


@pages
def test_the_python_blocks_run(programs, page):
    if page not in programs:
        assert not blocks(page, "python")
        return
    names = programs[page]
    assert names["monitor"].history
    for name, value in names.items():
        if isinstance(value, lightning_regdecay.WeightDecayMonitor):
            assert all(math.isfinite(figure) for record in value.history for figure in record.values()), name
    # What resuming says of a checkpoint without names is meant to be seen.
    assert [line for line in names["warnings"] if "has no parameter names" not in line] == []


def test_the_optimizers_that_are_built(programs):
    names = programs[ROOT / "examples" / "optimizers.md"]
    assert names["LitSGD"]().configure_optimizers()["lr_scheduler"]["interval"] == "step"
    optimizer = programs[OF_THE_COMMAND_LINE]["LitChoice"]().configure_optimizers()
    assert [group["name"] for group in optimizer.param_groups] == ["bias", "norm", "head", "rest"]


@pages
def test_what_is_shown_below_a_block_is_what_it_prints(programs, page):
    for shown, printed in programs.get(page, {}).get("outputs", []):
        assert printed == shown


def test_tables_are_shown(programs):
    assert len(programs[README]["outputs"]) >= 1
    assert len(programs[ROOT / "examples" / "learning-rates.md"]["outputs"]) >= 2


@pages
def test_the_sessions_show_what_really_happens(programs, page):
    names = dict(programs.get(page, {}))
    for number, session in enumerate(blocks(page, "pycon")):
        test = doctest.DocTestParser().get_doctest(session, names, f"session {number}", page.name, 0)
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(test, clear_globs=False)
        names.update(test.globs)
        assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("rules", [["no_decay", "head", "rest"]]),
        ("schedules", [["bias", "head", "rest"], ["bias", "rest"], ["bias", "head", "rest"]]),
        ("presets", [["head", "no_decay", "decay"]]),
    ],
)
def test_the_yaml_is_rules(programs, page, expected):
    rules = [yaml.safe_load(block)["decay_rules"] for block in blocks(ROOT / "examples" / f"{page}.md", "yaml")]
    model = programs[README]["LitModel"]()
    assert [lightning_regdecay.build_decay_groups(model, one).names for one in rules] == expected


@pytest.mark.parametrize(
    ("page", "model", "expected"),
    [
        ("parts", "tagger", ["padding", "new", "qkv.q", "qkv.k", "qkv.v", "bias", "rest"]),
        ("starts", "model", ["head", "rest"]),
    ],
)
def test_the_yaml_is_rules_for_the_model_of_its_page(programs, page, model, expected):
    path = ROOT / "examples" / f"{page}.md"
    [rules] = [yaml.safe_load(block)["decay_rules"] for block in blocks(path, "yaml")]
    assert lightning_regdecay.build_decay_groups(programs[path][model], rules).names == expected


def test_the_cells_of_how_do_i_are_rules(programs):
    cells = re.findall(r"`(?:decay_rules = )?(\{.*?\})`", README.read_text())
    whole = [ast.literal_eval(cell) for cell in cells if "…" not in cell and ":" in cell]
    assert len(whole) >= 4
    for rules in whole:
        assert parse_rules(rules)


def test_resumed_runs_log_what_is_shown(programs):
    shown = [line for text in blocks(OF_RESUMING, "text") if "(checkpoint)" in text for line in text.splitlines()]
    assert len(shown) == 4
    assert [line for line in programs[OF_RESUMING]["log"] if line in shown] == shown


def test_the_schedule_goes_where_it_should(programs):
    strengths = programs[ROOT / "examples" / "schedules.md"]["strengths"]
    assert strengths[0] == 0.04
    assert strengths[50] == pytest.approx(0.22)
    assert 0.399 < strengths[-1] < 0.4


def test_the_command_line(tmp_path):
    # The programs, their configurations and commands go by py, yml and sh; the blocks above are run in other ways.
    page = OF_THE_COMMAND_LINE
    files = {text.splitlines()[0].removeprefix("# "): text for kind in ("py", "yml") for text in blocks(page, kind)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    groups, *fits = "".join(blocks(page, "sh")).splitlines()
    run = functools.partial(subprocess.run, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    done = run(groups.replace("python", shlex.quote(sys.executable), 1))
    assert done.stdout in blocks(page, "text"), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {*files}

    assert len(fits) == 4
    for fit in fits:
        done = run(fit.replace("python", shlex.quote(sys.executable), 1) + " --trainer.accelerator cpu")
        assert done.returncode == 0, done.stderr
    changed, unchanged, preset, callbacks = (
        (tmp_path / f"lightning_logs/version_{i}/config.yaml").read_text() for i in range(4)
    )
    assert "head.*: 0.01\n" in changed
    assert "class_path: torch.optim.SGD\n" in unchanged
    assert yaml.safe_load(preset)["model"]["decay_rules"] == {"preset": "timm", "weight_decay": 0.05}
    names = [callback["class_path"] for callback in yaml.safe_load(callbacks)["trainer"]["callbacks"]]
    assert names == ["lightning_regdecay.WeightDecayRules", "lightning_regdecay.WeightDecayMonitor"]
    assert re.search(r"rest\W+1\W+64\W+0\.05\b", done.stdout)


@pytest.mark.parametrize("name", lightning_regdecay.__all__)
def test_every_public_name_is_shown(name):
    assert re.search(rf"\b{name}\b", README.read_text())


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


def test_the_tuning_table_says_what_the_text_says():
    [output] = [text for text in blocks(OF_TUNING, "text") if "pruned" in text]
    studies, rows = tuning_tables(output)
    assert all(int(pruned) > 0 for _, pruned, _ in studies)
    scores = {name: row[6] for name, row in rows.items()}
    assert scores["AdamW's own"] < scores["one λ for all"] < scores["one λ per group"]


@pytest.mark.parametrize(("threshold", "state", "epochs"), [(1000, "PRUNED", [0]), (-1000, "COMPLETE", [0, 1, 2])])
def test_the_tuning_example_prunes(threshold, state, epochs, monkeypatch):
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("optuna_integration")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    tune = runpy.run_path(str(ROOT / "examples" / "tune.py"))
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=threshold))
    study.optimize(lambda trial: tune["objective"](trial, tune["per_group"](trial), 3), n_trials=1)
    [trial] = study.trials
    assert trial.state.name == state
    assert list(trial.intermediate_values) == epochs
