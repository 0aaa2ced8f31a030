"""Search one weight decay per group with Optuna, and compare it with the best uniform weight decay.

    python examples/tune.py
    python examples/tune.py --trials 100 --storage sqlite:///tune.db    # go on with it later

The network of `photo.py` learns a photograph (scikit-learn's `china.jpg`, 160x106 pixels) from 5 % of its pixels. Each
trial trains with other `decay_rules`, the score is the peak signal-to-noise ratio (PSNR) on another 5 % of the pixels,
and trials that lag behind are pruned.

A second study with as many trials tunes one λ for all weights. The best of both, and AdamW's own weight decay, are then
trained anew with other seeds and scored on the remaining 90 % of the pixels: a table of them is printed. The trials of
both studies, λ against score, go to `tune.png`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import warnings
from collections.abc import Callable

import optuna
import torch
from optuna.trial import TrialState
from optuna_integration import PyTorchLightningPruningCallback
from photo import GROUPS, lambdas, train

PHOTO = "china.jpg"
LAMBDAS = (1e-2, 1e2)  # the range of the search
SEEDS = (0, 1)  # of the trainings that a trial is scored by
NEW_SEEDS = (2, 3, 4, 5, 6)  # of the trainings that are scored on the test pixels

Rules = dict[str, float]


def uniform(trial: optuna.trial.BaseTrial) -> Rules:
    """Rules with one λ for all weights."""
    return {"*.bias": 0.0, "*": trial.suggest_float("all", *LAMBDAS, log=True)}


def per_group(trial: optuna.trial.BaseTrial) -> Rules:
    """Rules with a λ for the weights of each group."""
    return {"*.bias": 0.0} | {f"{group}.*": trial.suggest_float(group, *LAMBDAS, log=True) for group in GROUPS}


SEARCHES = {"one λ for all": uniform, "one λ per group": per_group}


def objective(trial: optuna.Trial, rules: Rules, epochs: int) -> float:
    """Mean PSNR on the validation pixels, in dB; a trial that lags behind is pruned in its first training."""
    scores = []
    for seed in SEEDS:
        callbacks = [] if scores else [PyTorchLightningPruningCallback(trial, "val_psnr")]
        trainer, _, _ = train(PHOTO, rules, seed, epochs, logger=False, callbacks=callbacks)
        scores.append(trainer.callback_metrics["val_psnr"].item())
    return statistics.mean(scores)


def search(suggest: Callable[[optuna.trial.BaseTrial], Rules], args: argparse.Namespace) -> optuna.Study:
    """A study of `args.trials` trials, of which the storage may hold some already."""
    study = optuna.create_study(
        study_name=f"{suggest.__name__}, {args.epochs} epochs",
        storage=args.storage,
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=args.epochs // 4),
    )
    # A seed of its own for each resumption, or it would draw the same random numbers again.
    study.sampler = optuna.samplers.TPESampler(seed=args.seed + len(study.trials))
    study.optimize(
        lambda trial: objective(trial, suggest(trial), args.epochs),
        n_trials=max(args.trials - len(finished(study)), 0),
        show_progress_bar=sys.stderr.isatty(),
    )
    return study


def finished(study: optuna.Study, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
    """The trials in these states; by default the complete and the pruned ones."""
    return study.get_trials(deepcopy=False, states=states or (TrialState.COMPLETE, TrialState.PRUNED))


def table_row(name: str, rules: Rules, epochs: int) -> str:
    """A row of the table: the λ that the optimizer held for each group, and the scores of the new seeds."""
    val_scores, test_scores = [], []
    for seed in NEW_SEEDS:
        trainer, model, test_data = train(PHOTO, rules, seed, epochs, logger=False)
        val_scores.append(trainer.callback_metrics["val_psnr"].item())
        [result] = trainer.test(model, test_data, verbose=False)
        test_scores.append(result["test_psnr"])
    scores = "".join(f"{statistics.mean(s):>12.2f} ± {statistics.stdev(s):.2f}" for s in (val_scores, test_scores))
    return f"{name:<16}{lambdas(trainer)}{scores}"


def draw(uniform_study: optuna.Study, group_study: optuna.Study, path: str) -> None:
    """Every λ against the score, a panel each."""
    import matplotlib.pyplot as plt

    gray, blue = {"color": "tab:gray", "marker": "x", "ls": ""}, {"color": "tab:blue", "marker": "o", "ls": ""}
    panels = [(uniform_study, "all"), *((group_study, group) for group in GROUPS)]
    figure, axes = plt.subplots(1, len(panels), sharey=True, figsize=(2.1 * len(panels), 3.6), layout="constrained")
    for ax, (study, name) in zip(axes, panels):
        # Optuna gives a pruned trial the last value that it reported.
        for label, state, style in ("pruned early", TrialState.PRUNED, gray), ("complete", TrialState.COMPLETE, blue):
            trials = finished(study, state)
            ax.plot([t.params[name] for t in trials], [t.value for t in trials], label=label, **style)
        ax.plot(study.best_params[name], study.best_value, "*", color="tab:orange", markersize=15, label="best")
        ax.axhline(uniform_study.best_value, color="tab:orange", linestyle="--", label="best with one λ for all")
        ax.set_xscale("log")
        ax.set_xlim(LAMBDAS[0] / 2, LAMBDAS[1] * 2)
        ax.set_title("one λ for all" if name == "all" else f"group {name!r}")
        ax.set_xlabel("weight decay λ (no unit)")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("validation PSNR (dB)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30, help="in each of the two studies")
    parser.add_argument("--epochs", type=int, default=30, help="of each training")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--storage", help="an Optuna storage, such as sqlite:///tune.db, to go on from")
    parser.add_argument("--picture", default="tune.png", help="where to save the plot")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)  # on matrices this small, threads mostly wait for each other

    studies = {name: search(suggest, args) for name, suggest in SEARCHES.items()}
    for name, study in studies.items():
        trials, pruned = len(finished(study)), len(finished(study, TrialState.PRUNED))
        print(f"{name:<16}{trials:>4} trials, {pruned} pruned, best validation PSNR {study.best_value:.2f} dB")

    print(f"\n{'weight decay':<16}{''.join(f'{group:>9}' for group in GROUPS)}{'validation, dB':>19}{'test, dB':>19}")
    print(table_row("AdamW's own", {}, args.epochs))
    for name, suggest in SEARCHES.items():
        print(table_row(name, suggest(studies[name].best_trial), args.epochs))
    draw(*studies.values(), args.picture)
    print(f"\nsaved {args.picture}")


if __name__ == "__main__":
    main()
