"""The examples that train do what they say."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
from helpers import run_python

EXAMPLES = Path(__file__).parents[1] / "examples"


def photo(cwd, *options):
    """What examples/photo.py printed, and the rows of its table by name."""
    output = run_python(EXAMPLES / "photo.py", *options, cwd=cwd, timeout=240, MPLBACKEND="Agg")
    row = r"^(\S.*?)" + r" +([\d.e+-]+)" * 4 + r" +(\S+) ± (\S+)$"
    rows = {name: [*map(float, numbers)] for name, *numbers in re.findall(row, output, re.MULTILINE)}
    return output, rows


def test_the_photo_example(tmp_path):
    output, rows = photo(tmp_path, "--epochs", 2)
    assert list(rows) == ["AdamW's own", "one λ for all", "a λ per group"]
    assert [row[:4] for row in rows.values()] == [[0.01] * 4, [6.46] * 4, [0.0151, 81.3, 87.4, 0.208]]
    for *_, score, spread in rows.values():
        assert 10 < score < 25
        assert 0 < spread < 3
    assert "\nsaved decay.png; logs are in logs/, as CSV and for `tensorboard --logdir logs`\n" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decay.png", "logs"]
    assert (tmp_path / "decay.png").read_bytes().startswith(b"\x89PNG")
    folders = {"adamw", "uniform", "per-group"}
    assert {path.name for path in tmp_path.glob("logs/*")} == folders | {f"{name}-csv" for name in folders}
    runs = {path.parent.name for path in tmp_path.glob("logs/per-group/version_*/events.out.tfevents.*")}
    assert runs == {"version_0", "version_1", "version_2"}
    logged = (tmp_path / "logs/per-group-csv/version_0/metrics.csv").read_text().partition("\n")[0].split(",")
    assert {"train_loss", "val_psnr", "test_psnr", "decay/mid/l2_norm", "decay/total/penalty"} <= {*logged}


def test_the_photo_example_takes_rules(tmp_path):
    rules = {"*.bias": 0, "high.*": "3e1", "*": 0.1}
    output, rows = photo(tmp_path, "--epochs", 2, "--decay-rules", json.dumps(rules), "--picture", "mine.png")
    assert list(rows)[-1] == "your rules"
    assert rows["your rules"][:4] == [0.1, 0.1, 30, 0.1]
    assert "saved mine.png" in output
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    assert "decay/high/l2_norm" in (tmp_path / "logs/yours-csv/version_0/metrics.csv").read_text()


def test_the_photo_example_takes_yaml_from_a_file(tmp_path):
    (tmp_path / "rules.yaml").write_text("head.*: 1e-2\n'*': 0.5\n")
    _, rows = photo(tmp_path, "--epochs", 1, "--decay-rules", "rules.yaml")
    assert rows["your rules"][:4] == [0.5, 0.5, 0.5, 0.01]


def test_the_rules_of_the_photo_example_are_those_that_tuning_found():
    rules = runpy.run_path(str(EXAMPLES / "photo.py"))["RULES"]
    table = (EXAMPLES / "tuning.md").read_text()
    found = {
        name: [float(number) for number in re.search(rf"^{name}((?: +[\d.]+){{4}}) ", table, re.MULTILINE)[1].split()]
        for name in ("one λ for all", "one λ per group")
    }
    assert rules["one λ for all"] == {"*.bias": 0, "*": found["one λ for all"][0]}
    assert [*rules["a λ per group"].values()] == [0, *found["one λ per group"]]


def test_the_photo_example_is_scored_on_other_pixels_than_it_is_trained_on():
    example = runpy.run_path(str(EXAMPLES / "photo.py"))
    positions, colours = example["pixels"]("flower.jpg")
    assert positions.shape == (106 * 160, 2)
    assert colours.shape == (106 * 160, 3)
    parts = [{*example[part].tolist()} for part in ("TRAIN", "VAL", "TEST")]
    assert set.union(*parts) == {*range(106 * 160)}
    assert sum(map(len, parts)) == 106 * 160


def test_the_digits_example(tmp_path):
    rules = {"*.bias": 0, "*norm*": 0, "*": "1e-1"}
    options = ("--epochs", 2, "--decay-rules", json.dumps(rules))
    output = run_python(EXAMPLES / "digits.py", *options, cwd=tmp_path, timeout=120, MPLBACKEND="Agg")
    assert re.search(r"^rest +0.1 +\d+\.\d+ +\d+\.\d+$", output, flags=re.MULTILINE)
    assert len(re.findall(r"^test accuracy: 0\.\d+$", output, flags=re.MULTILINE)) == 1
    assert (tmp_path / "decay.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.glob("logs/digits/version_0/events.out.tfevents.*"))
    assert "decay/rest/l2_norm" in (tmp_path / "logs/digits-csv/version_0/metrics.csv").read_text()


def test_the_example_without_lightning(tmp_path):
    output = run_python(EXAMPLES / "plain_pytorch.py", cwd=tmp_path, timeout=120)
    assert re.search(r"^rest +\* +2 +4,736 +0\.29\d+ ", output, flags=re.MULTILINE)  # λ came to its end, in two parts
    assert re.search(r"^bias +\*\.bias +3 +138 +0 ", output, flags=re.MULTILINE)
    assert "param groups of the optimizer: 1\n" in output
    assert float(output.split()[-1]) > 0.9
    assert not list(tmp_path.iterdir())


def test_the_finetuning_example(tmp_path):
    output = run_python(EXAMPLES / "finetune.py", "--epochs", 1, "--shots", 2, cwd=tmp_path, timeout=240)
    groups, in_force = output.split("In force at the last step:")
    assert re.search(r"^layer_2\.decay .* 0\.75 x optimizer's$", groups, re.MULTILINE)
    lrs = {name: float(lr) for name, lr in re.findall(r"^(\S+) .* (\S+)$", in_force, re.MULTILINE) if "decay" in name}
    assert lrs["layer_1.decay"] / lrs["decay"] == lrs["layer_1.no_decay"] / lrs["no_decay"]
    assert abs(lrs["stem.decay"] / lrs["decay"] - 0.75**4) < 1e-4
    assert re.search(r"accuracy on 5 to 9 from 2 examples each: 0\.\d+ finetuned, 0\.\d+ without", output)
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_what_strengths_are_good_for(tmp_path):
    output = run_python(EXAMPLES / "strengths.py", "--shorter", 25, cwd=tmp_path, timeout=240)
    every = dict(re.findall(r"^(\w+)\n((?:  .*\n)+)", output, re.MULTILINE))
    assert list(every) == ["finetune", "tasks", "columns", "rows", "lr"]
    row = r"^  (\w.*?)  +(?:(\S* ?= .*?|) +)?((?:\S.*? \d+\.\d+ ± \d+\.\d+ *)+)$"
    names = {name: [found[0] for found in re.findall(row, text, re.MULTILINE)] for name, text in every.items()}
    assert names == {
        "finetune": ["none", "toward 0", "toward the start"] * 2,
        "tasks": ["none", "toward 0", "toward the start"],
        "columns": ["one for the tensor", "one for each band"],
        "rows": ["none", "one for the table", "another for the rare"],
        "lr": ["none", "constant", "timescale", "per_step"],
    }
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_strengths_scores_what_nothing_was_chosen_by(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = runpy.run_path(str(EXAMPLES / "strengths.py"))
    scores = example["Scores"]
    found = {"a": [scores({"x": 0.5}, {"x": 0.9})], "b": [scores({"x": 0.6}, {"x": 0.1})]}
    assert example["best"](found) == "b"
    words = example["texts"]()
    assert len({number for _, number in words}) == 12
    assert min(len(piece) for piece, _ in words) > 7


def test_the_example_in_transformers_trainer(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    output = run_python(EXAMPLES / "transformers_trainer.py", cwd=tmp_path, timeout=300)
    assert re.search(r"^embeddings\.no_decay .* 0 +0\.006$", output, re.MULTILINE)
    assert re.search(r"^attn .* 0\.05 +0\.003$", output, re.MULTILINE)
    assert "param groups of the optimizer: 2" in output
    assert float(re.search(r"loss on textwrap: (\S+)", output)[1]) < 4
    assert list(tmp_path.iterdir()) == []
