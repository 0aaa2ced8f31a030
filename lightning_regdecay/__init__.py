"""Weight decay as a first-class hyperparameter of a Lightning model.

All public names are here; what is slow to import, or needs an extra, is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_regdecay.cli import WeightDecayCLI
    from lightning_regdecay.figures.norms import GroupL2Norm
    from lightning_regdecay.groups.comparing import compare
    from lightning_regdecay.groups.groups import DecayGroup, DecayGroups, build_decay_groups
    from lightning_regdecay.mixin import WeightDecayMixin
    from lightning_regdecay.monitor import WeightDecayMonitor
    from lightning_regdecay.optim.in_force import apply_decay_rules, groups_in_force, schedule_weight_decay
    from lightning_regdecay.optim.resuming import resume_by_name
    from lightning_regdecay.retrofit import WeightDecayRules
    from lightning_regdecay.rules import presets
    from lightning_regdecay.rules.exporting import rules_as_yaml
    from lightning_regdecay.rules.rules import DecayRule, LrRule
    from lightning_regdecay.rules.schedules import DecaySchedule

_WHERE = {
    "DecayGroup": "groups.groups",
    "DecayGroups": "groups.groups",
    "DecayRule": "rules.rules",
    "DecaySchedule": "rules.schedules",
    "GroupL2Norm": "figures.norms",
    "LrRule": "rules.rules",
    "WeightDecayCLI": "cli",
    "WeightDecayMixin": "mixin",
    "WeightDecayMonitor": "monitor",
    "WeightDecayRules": "retrofit",
    "apply_decay_rules": "optim.in_force",
    "build_decay_groups": "groups.groups",
    "compare": "groups.comparing",
    "groups_in_force": "optim.in_force",
    "presets": "rules",
    "resume_by_name": "optim.resuming",
    "rules_as_yaml": "rules.exporting",
    "schedule_weight_decay": "optim.in_force",
}

__all__ = [
    "DecayGroup",
    "DecayGroups",
    "DecayRule",
    "DecaySchedule",
    "GroupL2Norm",
    "LrRule",
    "WeightDecayCLI",
    "WeightDecayMixin",
    "WeightDecayMonitor",
    "WeightDecayRules",
    "apply_decay_rules",
    "build_decay_groups",
    "compare",
    "groups_in_force",
    "presets",
    "resume_by_name",
    "rules_as_yaml",
    "schedule_weight_decay",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("lightning-regdecay")
    if name in _WHERE:
        if name == "presets":
            return importlib.import_module("lightning_regdecay.rules.presets")
        if name in ("WeightDecayMixin", "WeightDecayRules"):
            _import_callbacks()
        value = getattr(importlib.import_module(f"lightning_regdecay.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    hint = importlib.import_module("lightning_regdecay.rules.names").hint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; {hint(name, __all__)}")


def _import_callbacks() -> None:
    """Import the callbacks, as LightningCLI knows by their short names those that are imported."""
    importlib.import_module("lightning_regdecay.monitor")  # which imports that of the rules


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


if not {"lightning.pytorch.cli", "pytorch_lightning.cli"}.isdisjoint(sys.modules):
    _import_callbacks()
