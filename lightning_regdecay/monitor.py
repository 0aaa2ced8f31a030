"""``WeightDecayMonitor``: groups, live → loggers, table, plot."""

from __future__ import annotations

import fnmatch
import importlib
import re
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_regdecay.figures.history import Exposure, Thinning, end_table, rows
from lightning_regdecay.figures.measures import chosen
from lightning_regdecay.figures.measuring import Live, Measurer, live_groups
from lightning_regdecay.figures.plots import plot_history
from lightning_regdecay.groups.parameters import model_parameters
from lightning_regdecay.groups.rows import TABLE_HEADER, table_row, total_row
from lightning_regdecay.groups.shards import remember_flattened
from lightning_regdecay.groups.tables import Table, preformatted
from lightning_regdecay.optim.holders import is_deepspeed
from lightning_regdecay.optim.in_force import refresh
from lightning_regdecay.retrofit import OF_THE_MODEL, AnyCallback, let_go_of_model
from lightning_regdecay.rules.names import TOTAL
from lightning_regdecay.rules.scalars import true_or_false
from lightning_regdecay.rules.toward import START

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AS_THE_TRAINER = "log_every_n_steps"
_NOTHING_YET = "WeightDecayMonitor: nothing was logged yet"


class WeightDecayMonitor(AnyCallback):
    """Log the L2 norm, the effective penalty and the weight decay of every param group.

    The keys are ``<prefix>/<group>/l2_norm``, ``…/penalty``, ``…/weight_decay`` and ``<prefix>/total/penalty``. The
    penalty is ½·λ·‖w‖₂² with the λ that the optimizer holds at that moment: the term whose gradient is λ·w. Figures are
    taken after the last optimizer step of each epoch, before validation, and go to every logger and into
    ``trainer.callback_metrics``, where ModelCheckpoint and EarlyStopping find them.

    Works with and without :class:`WeightDecayMixin`: groups go by the ``name`` of the param group, else by their
    number, with several optimizers after the optimizer's name, as in ``decay/Adam/0/l2_norm``.

    Other figures tell whether λ is right, see :data:`~lightning_regdecay.figures.measures.FIGURES`: ``rms``,
    ``decay_per_step``, ``half_life``, ``equilibrium``, ``grad_norm``, ``update_ratio``, ``decay_share``, ``angle``,
    ``equilibrium_angle``, ``distance``, ``largest``. They are logged under these names. A figure that does not apply to
    a group and its optimizer is left out, and a line says why. For ``update_ratio``, ``decay_share`` and ``angle``
    there is one copy of the parameters, in their own types, from before a step that is logged until it is done.

    Args:
        every_n_steps: log every so many optimizer steps (``trainer.global_step``) too; ``"log_every_n_steps"`` for as
            many as the Trainer has under that name.
        prefix: the first part of the keys.
        prog_bar: also show the figures in the progress bar: True for all, ``"total"`` for the total penalty, or a list
            of keys, with or without the prefix, globs too (``"head/*"``).
        summary: print a table of the groups when the fit starts; ``"end"`` for one at its end of the first and the last
            norms and what is off (no decay reached a group, it decays within a few steps, the run is too short for its
            norm to come to rest, NaN since a step), ``"both"`` for both.
        figures: the names of the figures, ``"all"``, or None for ``l2_norm``, ``penalty`` and ``weight_decay``.

    Raises:
        MisconfigurationException: for an ``every_n_steps`` below 1, a prefix that loggers refuse, or, when the fit
            starts, figures of a step under DeepSpeed, whose engine steps past the optimizer.
        TypeError: for a ``prog_bar`` or ``summary`` that is none of these, and figures that are no names.
        ValueError: for a figure that is not known.

    Attributes:
        history: what was logged in this run, one dictionary per event with ``epoch``, ``step`` (optimizer steps done)
            and the logged keys. Kept through checkpoints; a fit that starts from step 0 starts it anew. Of more than
            1,000 events evenly spaced ones are kept, the first and the last always.
    """

    def __init__(
        self,
        every_n_steps: int | str | None = None,
        prefix: str = "decay",
        prog_bar: bool | str | Iterable[str] = False,
        summary: bool | str = True,
        figures: str | Iterable[str] | None = None,
    ) -> None:
        super().__init__()
        is_count = type(every_n_steps) is int and every_n_steps >= 1
        if not is_count and every_n_steps not in (None, _AS_THE_TRAINER):
            raise MisconfigurationException(
                f"every_n_steps must be a whole number of at least 1, or None, or {_AS_THE_TRAINER!r}, got "
                f"{every_n_steps!r}"
            )
        if not isinstance(prefix, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*", prefix):
            raise MisconfigurationException(
                f"prefix must be letters, digits, '_', '-', '.' and single '/' between them, got {prefix!r}"
            )
        self.every_n_steps = every_n_steps
        self.prefix = prefix
        self.prog_bar = _keys("prog_bar", prog_bar)
        is_named = isinstance(summary, str) and summary in ("start", "end", "both")
        self.summary = summary if is_named else true_or_false("summary", summary, "'start', 'end' and 'both'")
        self.figures = chosen(figures)
        self.history: list[dict[str, float]] = []
        self._thinning, self._exposure = Thinning(), Exposure()
        self._has_layout = False
        self._steps_seen = 0
        self._steps_a_batch = 1
        self._measurer = Measurer(self.figures)
        self._fit: object = None
        """Stands for the fit under way."""
        self._first_step: int | None = None
        self._published: set[str] = set()
        self._is_restored = self._evaluates = False
        self._trainer: weakref.ref[Trainer] | None = None  # of the run that the history is of

    @property
    def state_key(self) -> str:
        """Keeps the states of several monitors in one checkpoint apart."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """The history, as plain data."""
        history = [dict(record) for record in self.history]
        return {"history": history, **self._thinning.state(), **self._exposure.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history of a checkpoint, unless it is loaded to be validated or tested."""
        if not self._evaluates:
            self.history = [dict(record) for record in state_dict["history"]]
            self._thinning.load(state_dict, self.history)
            self._exposure.load(state_dict)
            self._is_restored = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note what a checkpoint is loaded for, should one be."""
        self._evaluates, self._is_restored = stage != "fit", False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Whatever is loaded from now on is loaded by hand."""
        self._evaluates = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the history anew unless the run goes on from a checkpoint, and print the table of the groups."""
        goes_on = self._is_restored or (self._trainer is not None and self._trainer() is trainer)
        if trainer.global_step == 0 or not goes_on:
            self.history, self._thinning, self._exposure = [], Thinning(), Exposure()
        self._has_layout, self._first_step = False, trainer.global_step
        self._is_restored, self._trainer = False, weakref.ref(trainer)
        self._steps_seen = trainer.global_step
        self._measurer.let_go()  # of a fit that failed
        self._fit = object()
        self._steps_a_batch = 1 if pl_module.automatic_optimization else (self._every(trainer) or 1)
        remember_flattened(pl_module if trainer.strategy.model is None else trainer.strategy.model)
        self._measurer.begin({name: p.parameter for p in model_parameters(pl_module) for name in p.names})
        for optimizer in trainer.optimizers:
            refresh(optimizer)
        self._watch(trainer)
        groups = dict(live_groups(trainer.optimizers))
        self._exposure.begin(trainer.global_step, {name: live.rate for name, live in groups.items()})
        # Not in on_fit_start, where a resumed run does not hold the λ and lr of its checkpoint yet.
        if self.summary in (True, "start", "both") and trainer.is_global_zero:
            Table(TABLE_HEADER, self._table_rows(trainer)).print()

    def _watch(self, trainer: Trainer) -> None:
        """Look on while the optimizers step, where a figure asks for it."""
        asked = self._measurer.of_a_step
        if asked and any(map(is_deepspeed, trainer.optimizers)):
            raise MisconfigurationException(
                "DeepSpeed's engine steps past the optimizer, so nobody can look on: leave out the figures "
                + ", ".join(asked)
            )
        reference, fit = weakref.ref(trainer), self._fit

        def is_over() -> bool:
            run = reference()
            return run is None or run.state.stopped or self._fit is not fit

        self._measurer.watch(lambda: [] if (run := reference()) is None else run.optimizers, is_over)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look on at the steps of this batch, should they be logged."""
        if not self._measurer.of_a_step:
            return
        self._watch(trainer)
        n, after = self._every(trainer), trainer.global_step + self._steps_a_batch
        is_due = n is not None and after // n > trainer.global_step // n
        is_last = trainer.is_last_batch or 0 < trainer.max_steps <= after
        every = trainer.val_check_batch
        is_validated = trainer.enable_validation and every is not None and (batch_idx + 1) % every == 0
        # By hand, optimizers may step in some batches only: then it is their last step that is logged.
        self._measurer.start_batch(is_due or is_last or is_validated, pl_module.automatic_optimization)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the end of an epoch, and every ``every_n_steps`` optimizer steps."""
        steps = trainer.global_step - self._steps_seen
        self._steps_a_batch = max(steps, 1 if pl_module.automatic_optimization else self._steps_a_batch)
        step_is_due = self._step_is_due(trainer)
        # The last batch stands for the epoch: validation, which follows, and callbacks that monitor find fresh figures.
        if step_is_due or trainer.is_last_batch:
            self._log(trainer, _logger_step(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put fresh figures where checkpoints are chosen."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not self._logged_at(trainer.global_step):
            self._publish(trainer, self._metrics(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the end of an epoch that ended before its last batch."""
        # By max_steps, or by -1 from on_train_batch_start.
        if _logger_step(trainer) > 0:
            self._log(trainer, _logger_step(trainer) - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table of the end, and let go of the model."""
        if self.history and self._first_step not in (None, trainer.global_step) and trainer.is_global_zero:
            self._tell_of_the_end(trainer)
        self._first_step = None
        self._let_go()

    def _tell_of_the_end(self, trainer: Trainer) -> None:
        for name in self._measurer.of_a_step:
            if not any(key.endswith(f"/{name}") for record in self.history for key in record):
                rank_zero_warn(f"no step was logged that {name} could be taken of, or it applies to no group")
        if self.summary in ("end", "both"):
            groups = dict(live_groups(trainer.optimizers))
            decoupled = {name for name, live in groups.items() if self._measurer.is_decoupled(live)}
            end_table(self.history, self.prefix, self._exposure, decoupled).print()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the model."""
        self._evaluates = False
        self._let_go()

    def _let_go(self) -> None:
        self._measurer.let_go()
        self._fit = None
        let_go_of_model(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: what is of the fit under way stays here."""
        own = {name: value for name, value in vars(self).items() if name not in OF_THE_MODEL}
        return {**own, "_trainer": None, "_fit": None}

    @property
    def _parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """Those of the model, during a fit."""
        return self._measurer.parameters

    @property
    def largest(self) -> dict[str, str]:
        """By group, the name of the tensor that the figure ``largest`` was of last."""
        return dict(self._measurer.largest)

    @property
    def table(self) -> Table:
        """The figures that were logged last, a row per group."""
        last = rows(self.history[-1:], self.prefix)
        cells = [[row["group"], *(f"{row[f]:.6g}" if f in row else "" for f in self.figures)] for row in last]
        return Table(("group", *self.figures), cells, left=1, has_total=any(row["group"] == TOTAL for row in last))

    def _repr_html_(self) -> str:
        """For notebooks: the figures that were logged last."""
        return self.table._repr_html_() if self.history else preformatted(_NOTHING_YET)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For IPython: the figures that were logged last."""
        printer.text(str(self.table) if self.history else _NOTHING_YET)

    def records(self) -> list[dict[str, Any]]:
        """What was logged, a row for each event and group: ``epoch``, ``step``, ``group``, figures by their names.

        The group ``total`` has the total penalty.
        """
        return rows(self.history, self.prefix)

    def to_frame(self) -> Any:
        """The same as a pandas ``DataFrame``.

        Raises:
            ModuleNotFoundError: without pandas.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ModuleNotFoundError:
            raise ModuleNotFoundError("to_frame() needs pandas: pip install pandas") from None
        return pandas.DataFrame.from_records(self.records(), columns=["epoch", "step", "group", *self.figures])

    def plot(
        self,
        ax: Any = None,
        *,
        figures: str | Iterable[str] | None = None,
        groups: str | Iterable[str] | None = None,
        x: str = "step",
    ) -> tuple[Figure, Any]:
        """Plot figures of the groups over time, a panel per figure: as lines, of more than 20 groups as heat maps.

        Args:
            ax: matplotlib axes to draw on, one for each figure; by default a new figure.
            figures: names of figures that were logged, or ``"all"``; by default ``l2_norm`` and ``penalty``, where
                neither was logged all that were. Where λ of a group moves, a new figure has it as its third panel.
            groups: names of groups, or patterns such as ``"head*"``; by default all.
            x: ``"step"``, the optimizer steps done, or ``"epoch"``, the epochs done.

        Returns:
            The figure and its axes, in the order of the figures.

        Raises:
            ModuleNotFoundError: without matplotlib.
            TypeError: for figures and groups that are no names, and an ``ax`` that is none.
            ValueError: where nothing was logged yet, for figures that were not logged and groups that there are none
                of, another ``x``, and an ``ax`` that is not one for each figure.
        """
        return plot_history(self.history, self.prefix, ax, figures=figures, groups=groups, x=x)

    def _every(self, trainer: Trainer) -> int | None:
        """How many optimizer steps lie between events, None for epochs alone."""
        if isinstance(self.every_n_steps, str):
            return trainer.log_every_n_steps or None  # type: ignore[attr-defined]
        return self.every_n_steps

    def _step_is_due(self, trainer: Trainer) -> bool:
        """Whether a multiple of ``every_n_steps`` was reached since the last call; a batch may take several steps."""
        before, self._steps_seen = self._steps_seen, trainer.global_step
        n = self._every(trainer)
        return n is not None and trainer.global_step // n > before // n

    def _logged_at(self, step: int) -> bool:
        return bool(self.history) and self.history[-1]["step"] == step

    def _log(self, trainer: Trainer, logger_step: int) -> None:
        """Log the figures, once per optimizer step."""
        if self._logged_at(trainer.global_step):
            return
        metrics = self._metrics(trainer)
        self._publish(trainer, metrics)
        record = {"epoch": trainer.current_epoch, "step": trainer.global_step, **metrics}
        self._thinning.append(self.history, record)
        self._lay_out(trainer)
        for logger in trainer.loggers:
            # The step that Lightning itself gives to what training logs, so that all of it shares one axis.
            logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=logger_step)

    def _publish(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Where other callbacks, the progress bar and the user look for metrics."""
        device = trainer.strategy.root_device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which Apple's MPS does not have
        values = torch.tensor(list(metrics.values()), dtype=dtype, device=device).unbind()
        tensors = dict(zip(metrics, values))
        for key in self._published - metrics.keys():  # which have no value any more
            trainer.callback_metrics.pop(key, None)
        self._published = set(metrics)
        trainer.callback_metrics.update(tensors)
        if trainer.loggers:
            trainer.logged_metrics.update(tensors)
        if self.prog_bar:
            shown = {key: value for key, value in metrics.items() if self._is_shown(key)}
            # As text, of which the bars leave the digits of a small number.
            trainer.progress_bar_metrics.update({key: f"{value:.3g}" for key, value in shown.items()})  # type: ignore[misc]

    def _is_shown(self, key: str) -> bool:
        """Whether a key goes into the progress bar."""
        if self.prog_bar is True:
            return True
        own = key.removeprefix(f"{self.prefix}/")
        given = [self.prog_bar] if isinstance(self.prog_bar, str) else self.prog_bar
        patterns = [f"{TOTAL}/*" if pattern == TOTAL else pattern for pattern in given]
        return any(fnmatch.fnmatchcase(name, pattern) for name in (key, own) for pattern in patterns)

    def _lay_out(self, trainer: Trainer) -> None:
        """One chart for each figure with all groups in it, in TensorBoard's custom scalars."""
        if self._has_layout:
            return
        # TensorBoard keeps one layout for a run, so it has that of all monitors.
        monitors = [one for one in trainer.callbacks if isinstance(one, WeightDecayMonitor)]  # type: ignore[attr-defined]
        layout = {}
        for one in monitors:
            one._has_layout = True
            layout[one.prefix] = {name: ["Multiline", [f"^{re.escape(one.prefix)}/.*/{name}$"]] for name in one.figures}
        for logger in trainer.loggers:
            if any(cls.__name__ == "TensorBoardLogger" for cls in type(logger).__mro__):
                logger.experiment.add_custom_scalars(layout)  # type: ignore[attr-defined]

    def _metrics(self, trainer: Trainer) -> dict[str, float]:
        """The logged values of this moment by key."""
        groups = dict(live_groups(trainer.optimizers))
        self._exposure.add(trainer.global_step, {name: live.rate for name, live in groups.items()})
        found = self._measurer.measure(groups)
        metrics = {f"{self.prefix}/{name}/{key}": v for name, figures in found.items() for key, v in figures.items()}
        if "penalty" in self.figures:
            metrics[f"{self.prefix}/{TOTAL}/penalty"] = sum(figures["penalty"] for figures in found.values())
        return metrics

    def _table_rows(self, trainer: Trainer) -> list[list[str]]:
        """The cells of the table at fit start, with the λ and the lr that the optimizers hold."""
        groups = dict(live_groups(trainer.optimizers))
        rows = [
            table_row(
                name,
                live.text or "-",
                self._measurer.members(live),
                _cell_of_strength(live),
                "-" if live.group.get("lr") is None else float(live.group["lr"]),
                live.regions or None,
            )
            for name, live in groups.items()
        ]
        every = {id(p): p for live in groups.values() for p in self._measurer.members(live)}
        return [*rows, total_row(every.values())]


def _logger_step(trainer: Trainer) -> int:
    """The step that Lightning gives to what is logged for this batch; after the batch it is one further.

    No public attribute has it; Lightning's own callbacks, such as LearningRateMonitor, read it here too.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _keys(name: str, value: Any) -> Any:
    """A switch, a key or a list of keys."""
    if isinstance(value, str) and (value == TOTAL or "/" in value):
        return value
    keys = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else (None,)
    is_keys = all(isinstance(key, str) for key in keys)
    return (
        keys if is_keys else true_or_false(name, value, f"{TOTAL!r}, a key such as 'head/l2_norm' and a list of keys")
    )


def _cell_of_strength(live: Live) -> str:
    """The λ of a param group, with what it decays toward and the schedule that it is on."""
    toward = "" if live.starts is None else " toward start" if live.group["toward"] == START else " toward given"
    return f"{live.weight_decay:g}{toward}" + (f" ({live.schedule})" if live.schedule else "")
