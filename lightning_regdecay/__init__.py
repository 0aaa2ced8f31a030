"""Weight decay as a first-class hyperparameter of a Lightning model."""

from lightning_regdecay.figures.norms import GroupL2Norm
from lightning_regdecay.groups.groups import DecayGroup, build_decay_groups
from lightning_regdecay.mixin import WeightDecayMixin
from lightning_regdecay.monitor import WeightDecayMonitor
from lightning_regdecay.rules.rules import DecayRule

__all__ = [
    "DecayGroup",
    "DecayRule",
    "GroupL2Norm",
    "WeightDecayMixin",
    "WeightDecayMonitor",
    "build_decay_groups",
]
