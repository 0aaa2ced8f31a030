"""``WeightDecayMonitor``: groups, live → loggers, table, plot."""

from __future__ import annotations

import fnmatch
import importlib
import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_regdecay.figures.history import Exposure, Thinning, end_table, rows
from lightning_regdecay.figures.measures import OF_A_STEP, OF_AN_UPDATE, Measured, chosen, figure
from lightning_regdecay.figures.norms import GroupL2Norm, LocalSums, is_measurable
from lightning_regdecay.figures.plots import plot_history
from lightning_regdecay.figures.steps import BEFORE, GRADIENT, UPDATE, StepWatcher
from lightning_regdecay.groups.groups import TABLE_HEADER, numel_of, table_row, total_row
from lightning_regdecay.groups.parameters import model_parameters
from lightning_regdecay.groups.shards import remember_flattened
from lightning_regdecay.groups.tables import Table, preformatted
from lightning_regdecay.optim.decoupling import is_decoupled
from lightning_regdecay.optim.holders import innermost, unwrapped, with_held
from lightning_regdecay.optim.in_force import in_force, refresh, watch
from lightning_regdecay.retrofit import OF_THE_MODEL, AnyCallback, let_go_of_model
from lightning_regdecay.rules.names import safe_name, unique_name
from lightning_regdecay.rules.scalars import true_or_false

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHOLE = "whole"
"""In the place of the number of a tensor, a whole group."""
NEEDS_SIZES = {"rms", "equilibrium", "largest"}
NEEDS_KIND = {"equilibrium", "decay_share", "equilibrium_angle"}
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
    ``equilibrium_angle``, ``largest``. They are logged under these names. A figure that does not apply to a group and
    its optimizer is left out, and a line says why. For ``update_ratio``, ``decay_share`` and ``angle`` there is one
    copy of the parameters, from before a step that is logged until it is done (as float32 for half types).

    Args:
        every_n_steps: log every so many optimizer steps (``trainer.global_step``) too.
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
        largest: by group, the name of the tensor that the figure ``largest`` was of last.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        prefix: str = "decay",
        prog_bar: bool | str | Iterable[str] = False,
        summary: bool | str = True,
        figures: str | Iterable[str] | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps is not None and (type(every_n_steps) is not int or every_n_steps < 1):
            raise MisconfigurationException(
                f"every_n_steps must be a whole number of at least 1, or None, got {every_n_steps!r}"
            )
        if not isinstance(prefix, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*", prefix):
            raise MisconfigurationException(
                f"prefix must be letters, digits, '_', '-', '.' and single '/' between them, got {prefix!r}"
            )
        self.every_n_steps = every_n_steps
        self.prefix = prefix
        self.prog_bar = _keys("prog_bar", prog_bar)
        self.summary = summary if summary in ("start", "end", "both") else true_or_false("summary", summary)
        self.figures = chosen(figures)
        self.history: list[dict[str, float]] = []
        self.largest: dict[str, str] = {}
        self._thinning, self._exposure = Thinning(), Exposure()
        self._has_layout = False
        self._steps_seen = 0
        self._steps_a_batch = 1
        self._watcher: StepWatcher | None = None
        self._end_watch: Callable[[], None] | None = None
        self._warned: set[str] = set()
        self._left_out: set[str] = set()
        self._l2_norm: GroupL2Norm | None = None  # kept, as to make one takes as long as the norms of a small model
        self._parameters: dict[str, torch.nn.Parameter] = {}  # of the model, by name
        self._is_restored = self._evaluates = False
        self._trainer: weakref.ref[Trainer] | None = None  # of the run that the history is of

    @property
    def state_key(self) -> str:
        """Keeps the states of several monitors in one checkpoint apart."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """The history, as plain data."""
        return {"history": [dict(record) for record in self.history], **self._thinning.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history of a checkpoint, unless it is loaded to be validated or tested."""
        if not self._evaluates:
            self.history = [dict(record) for record in state_dict["history"]]
            self._thinning.load(state_dict, self.history)
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
            self.history, self._thinning = [], Thinning()
        self._exposure, self._has_layout = Exposure(trainer.global_step), False
        self._is_restored, self._trainer = False, weakref.ref(trainer)
        self._steps_seen = trainer.global_step
        self._warned.clear()
        self._left_out.clear()
        remember_flattened(pl_module if trainer.strategy.model is None else trainer.strategy.model)
        self._parameters = {name: p.parameter for p in model_parameters(pl_module) for name in p.names}
        self._l2_norm = None  # a fit that failed has left its own
        for optimizer in trainer.optimizers:
            refresh(optimizer)
        self._watch(trainer)
        # Not in on_fit_start, where a resumed run does not hold the λ and lr of its checkpoint yet.
        if self.summary in (True, "start", "both") and trainer.is_global_zero:
            Table(TABLE_HEADER, self._table_rows(trainer)).print()

    def _watch(self, trainer: Trainer) -> None:
        """Look on while the optimizers step, where a figure asks for it."""
        self._stop_watching()
        if OF_A_STEP.isdisjoint(self.figures):
            return
        if any(_is_deepspeed(optimizer) for optimizer in trainer.optimizers):
            asked = ", ".join(name for name in self.figures if name in OF_A_STEP)
            raise MisconfigurationException(
                f"DeepSpeed's engine steps past the optimizer, so nobody can look on: leave out the figures {asked}"
            )
        # By hand there may be any number, which the batches before tell.
        by_hand = not trainer.lightning_module.automatic_optimization
        self._steps_a_batch = (self.every_n_steps or 1) if by_hand else 1
        reference = weakref.ref(trainer)

        def groups_of(optimizer: Any) -> dict[str, dict[str, Any]]:
            run = reference()
            found = {} if run is None else dict(_live_groups(run))
            steps = {id(one) for one in with_held(optimizer)}
            return {
                name: {**live.group, "params": self._measurable(name, live)}
                for name, live in found.items()
                if any(id(one) in steps for one in with_held(live.optimizer))
            }

        self._watcher = StepWatcher(
            groups_of, gradients="grad_norm" in self.figures, updates=not OF_AN_UPDATE.isdisjoint(self.figures)
        )
        self._end_watch = watch(trainer.optimizers, self._watcher)

    def _stop_watching(self) -> None:
        if self._end_watch is not None:
            self._end_watch()
        self._watcher = self._end_watch = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look on at the steps of this batch, should they be logged."""
        if self._watcher is not None:
            n, after = self.every_n_steps, trainer.global_step + self._steps_a_batch
            is_due = n is not None and after // n > trainer.global_step // n
            is_last = trainer.is_last_batch or 0 < trainer.max_steps <= after
            self._watcher.start_batch(is_due or is_last)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the end of an epoch, and every ``every_n_steps`` optimizer steps."""
        self._steps_a_batch = max(trainer.global_step - self._steps_seen, 1)
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
        if self.summary in ("end", "both") and self.history and trainer.is_global_zero:
            end_table(self.history, self.prefix, self._exposure).print()
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the model."""
        self._evaluates = False
        self._let_go()

    def _let_go(self) -> None:
        self._stop_watching()
        self._parameters, self._l2_norm = {}, None
        let_go_of_model(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: what is of the fit under way stays here."""
        own = {name: value for name, value in vars(self).items() if name not in OF_THE_MODEL}
        here = {"_l2_norm": None, "_trainer": None, "_watcher": None, "_end_watch": None}
        return {**own, "_parameters": {}, **here}

    @property
    def table(self) -> Table:
        """The figures that were logged last, a row per group."""
        last = self.history[-1] if self.history else {}

        def cell(group: str, name: str) -> str:
            value = last.get(f"{self.prefix}/{group}/{name}")
            return "" if value is None else f"{value:.6g}"

        names = groups_in(last, self.prefix)
        rows = [[name, *(cell(name, figure) for figure in self.figures)] for name in names]
        has_total = f"{self.prefix}/total/penalty" in last
        if has_total:
            rows.append(["total", *(cell("total", figure) for figure in self.figures)])
        return Table(("group", *self.figures), rows, left=1, has_total=has_total)

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
            figures: names of figures that were logged; by default ``l2_norm`` and ``penalty``, where neither was
                logged all that were. Where λ of a group moves, a new figure has it as its third panel.
            groups: names of groups, or patterns such as ``"head*"``; by default all.
            x: ``"step"``, the optimizer steps done, or ``"epoch"``, the epochs done.

        Returns:
            The figure and its axes, in the order of the figures.

        Raises:
            ModuleNotFoundError: without matplotlib.
            ValueError: where nothing was logged yet, for figures that were not logged and groups that there are none
                of, another ``x``, and an ``ax`` that is not one for each figure.
        """
        return plot_history(self.history, self.prefix, ax, figures=figures, groups=groups, x=x)

    def _step_is_due(self, trainer: Trainer) -> bool:
        """Whether a multiple of ``every_n_steps`` was reached since the last call; a batch may take several steps."""
        before, self._steps_seen = self._steps_seen, trainer.global_step
        n = self.every_n_steps
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
        patterns = ["total/*" if pattern == "total" else pattern for pattern in given]
        return any(fnmatch.fnmatchcase(name, pattern) for name in (key, own) for pattern in patterns)

    def _lay_out(self, trainer: Trainer) -> None:
        """One chart for each figure with all groups in it, in TensorBoard's custom scalars."""
        if self._has_layout:
            return
        self._has_layout = True
        charts = {name: ["Multiline", [f"^{re.escape(self.prefix)}/.*/{name}$"]] for name in self.figures}
        for logger in trainer.loggers:
            if any(cls.__name__ == "TensorBoardLogger" for cls in type(logger).__mro__):
                logger.experiment.add_custom_scalars({self.prefix: charts})  # type: ignore[attr-defined]

    def _metrics(self, trainer: Trainer) -> dict[str, float]:
        """The logged values of this moment by key."""
        groups = dict(_live_groups(trainer))
        members = {name: self._measurable(name, live) for name, live in groups.items()}
        sums = {} if self._watcher is None else self._watcher.take()
        norms = self._norms(members, sums)
        metrics: dict[str, float] = {}
        self._exposure.add(trainer.global_step, {name: _rate(live) for name, live in groups.items()})
        for name, live in groups.items():
            measured = self._measured(name, live, members[name], norms)
            for figure_name in self.figures:
                value = figure(figure_name, measured)
                if isinstance(value, str):
                    self._say_once(f"{figure_name} of group {name!r} is left out: {value}")
                elif value is not None:
                    metrics[f"{self.prefix}/{name}/{figure_name}"] = value
            self._warn_if_not_finite(name, measured.norm)
        if "penalty" in self.figures:
            metrics[f"{self.prefix}/total/penalty"] = sum(metrics[f"{self.prefix}/{name}/penalty"] for name in groups)
        return metrics

    def _norms(
        self, members: Mapping[str, list[torch.Tensor]], sums: Mapping[tuple[str, str], LocalSums]
    ) -> dict[tuple[str, Any], float]:
        """The norms of groups, of single tensors where one is asked for, and of what was seen of a step.

        All by one metric, so that there is at most one collective.
        """
        places: dict[str, tuple[str, Any]] = {}
        tensors: dict[str, list[torch.Tensor]] = {}
        for name, of_group in members.items():
            parts = dict(enumerate([tensor] for tensor in of_group)) if self._asks_for_tensors else {WHOLE: of_group}
            for key, some in parts.items():
                places[f"{len(places)}"], tensors[f"{len(tensors)}"] = (name, key), some
        seen = {(name, kind): f"{name}/{kind}" for name, kind in sums}
        columns = (*places, *seen.values())
        if self._l2_norm is None or self._l2_norm.groups != columns:
            self._l2_norm = GroupL2Norm(columns)
        self._l2_norm.reset()
        self._l2_norm.update(tensors)
        self._l2_norm.add({seen[key]: of_step for key, of_step in sums.items()})
        found = {name: norm.item() for name, norm in self._l2_norm.compute().items()}
        norms = {place: found[column] for column, place in places.items()}
        norms.update({key: found[column] for key, column in seen.items()})
        if self._asks_for_tensors:
            for name, of_group in members.items():
                norms[name, WHOLE] = math.hypot(*(norms[name, number] for number in range(len(of_group))))
        return norms

    @property
    def _asks_for_tensors(self) -> bool:
        return "largest" in self.figures

    def _measured(
        self, name: str, live: _Live, members: list[torch.Tensor], norms: Mapping[tuple[str, Any], float]
    ) -> Measured:
        """What was measured of a group."""
        group, optimizer = live.group, innermost([unwrapped(live.optimizer)])
        known = _Kind.of(optimizer, group) if NEEDS_KIND.intersection(self.figures) else _Kind(None, False, None)
        sizes = [numel_of([tensor]) for tensor in members] if NEEDS_SIZES.intersection(self.figures) else []
        largest = None
        if self._asks_for_tensors and members:
            every = [norms[name, number] / math.sqrt(size or 1) for number, size in enumerate(sizes)]
            number = max(range(len(every)), key=every.__getitem__)
            largest = every[number]
            names = group["param_names"]
            self.largest[name] = names[number] if len(names) == len(members) else str(number)
        return Measured(
            norm=norms[name, WHOLE],
            numel=sum(sizes),
            weight_decay=_weight_decay(live),
            lr=None if group.get("lr") is None else float(group["lr"]),
            is_decoupled=known.is_decoupled,
            is_adam_like=known.is_adam_like,
            beta=known.beta,
            before=norms.get((name, BEFORE)),
            gradient=norms.get((name, GRADIENT)),
            update=norms.get((name, UPDATE)),
            decay_of_step=None if self._watcher is None else self._watcher.decay.get(name),
            largest=largest,
        )

    def _say_once(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            rank_zero_info(line)

    def _measurable(self, name: str, live: _Live) -> list[torch.Tensor]:
        """The members of a group, without those of which no norm can be taken."""
        members = self._members(live)
        found = [tensor for tensor in members if is_measurable(tensor)]
        if len(found) < len(members) and name not in self._left_out:
            self._left_out.add(name)
            rank_zero_warn(
                f"{len(members) - len(found)} parameters of group {name!r} are left out of its norm and penalty: they "
                "are in a layout of which no norm can be taken"
            )
        return found

    def _members(self, live: _Live) -> list[torch.Tensor]:
        """The parameters of the model that a param group updates.

        DeepSpeed (0.19) puts flat parts of float32 copies in the place of a group's parameters, or nothing at all; the
        names stay.
        """
        group = live.group
        names = group["param_names"]
        if not live.is_deepspeed or not names or not all(name in self._parameters for name in names):
            return group["params"]  # type: ignore[no-any-return]
        return [self._parameters[name] for name in names]

    def _warn_if_not_finite(self, name: str, norm: float) -> None:
        if not math.isfinite(norm) and name not in self._warned:
            self._warned.add(name)
            rank_zero_warn(f"the L2 norm of group {name!r} is {norm}: its parameters hold NaN or infinity")

    def _table_rows(self, trainer: Trainer) -> list[list[str]]:
        """The cells of the table at fit start, with the λ and the lr that the optimizers hold."""
        groups = dict(_live_groups(trainer))
        rows = [
            table_row(
                name,
                live.text or "-",
                self._members(live),
                _cell_of_strength(live),
                "-" if live.group.get("lr") is None else float(live.group["lr"]),
            )
            for name, live in groups.items()
        ]
        return [*rows, total_row(parameter for live in groups.values() for parameter in self._members(live))]


class _Kind(NamedTuple):
    """What kind of steps an optimizer does with a param group."""

    is_decoupled: bool | None
    is_adam_like: bool
    beta: float | None

    @staticmethod
    def of(optimizer: Any, group: Mapping[str, Any]) -> _Kind:
        """As far as it can be found out."""
        state = optimizer.state.get(group["params"][0], {}) if group["params"] else {}
        betas = group.get("betas")
        beta = float(betas[0]) if isinstance(betas, (list, tuple)) and betas else None
        return _Kind(is_decoupled(optimizer, group), "exp_avg_sq" in state and beta is not None, beta)


class _Live(NamedTuple):
    """A param group as its optimizer steps over it."""

    group: dict[str, Any]
    text: str
    """The rule that it is under."""
    schedule: str
    is_deepspeed: bool
    optimizer: Any


def _is_deepspeed(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.")


def groups_in(record: Mapping[str, Any], prefix: str) -> list[str]:
    """The names of the groups that a record of the history has figures of, in order."""
    paths = [key.removeprefix(f"{prefix}/").rpartition("/")[0] for key in record if key.startswith(f"{prefix}/")]
    return [name for name in dict.fromkeys(paths) if name != "total"]


def _logger_step(trainer: Trainer) -> int:
    """The step that Lightning gives to what is logged for this batch; after the batch it is one further.

    No public attribute has it; Lightning's own callbacks, such as LearningRateMonitor, read it here too.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _keys(name: str, value: Any) -> Any:
    """A switch, a key or a list of keys."""
    if isinstance(value, str) and (value == "total" or "/" in value):
        return value
    if isinstance(value, (list, tuple, set)) and all(isinstance(key, str) for key in value):
        return tuple(value)
    return true_or_false(name, value)


def _rate(live: _Live) -> float:
    """lr·λ of a param group at this moment."""
    return float(live.group.get("lr") or 0.0) * _weight_decay(live)


def _weight_decay(live: _Live) -> float:
    """The λ of a param group at this moment, 0 for an optimizer that knows none."""
    return float(live.group.get("weight_decay") or 0.0)


def _cell_of_strength(live: _Live) -> str:
    """The λ of a param group, with the schedule that it is on."""
    return f"{_weight_decay(live):g}" + (f" ({live.schedule})" if live.schedule else "")


def _live_groups(trainer: Trainer) -> Iterator[tuple[str, _Live]]:
    """Every param group of every optimizer as it is stepped over, under the name that it has in the keys."""
    optimizers: set[str] = set()
    for optimizer in trainer.optimizers:
        path = ""
        if len(trainer.optimizers) > 1:
            optimizer_name = unique_name(safe_name(type(optimizer).__name__), optimizers)
            optimizers.add(optimizer_name)
            path = f"{optimizer_name}/"
        taken = {"total"}
        for found in in_force(optimizer):
            name = unique_name(safe_name(str(found.group["name"])), taken)
            taken.add(name)
            schedule = "" if found.schedule is None else found.schedule.text
            yield path + name, _Live(found.group, found.text, schedule, _is_deepspeed(optimizer), optimizer)
