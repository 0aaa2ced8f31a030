"""What is in the forms that ``configure_optimizers`` may return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def optimizers_in(config: Any) -> Iterator[Any]:
    """The optimizers in any of the forms."""
    if isinstance(config, Mapping):
        yield from optimizers_in(config.get("optimizer"))
    elif isinstance(config, (list, tuple)):
        for entry in config:
            yield from optimizers_in(entry)
    elif hasattr(config, "param_groups"):
        yield config


def lr_schedulers_in(config: Any) -> Iterator[Any]:
    """The lr schedulers in any of the forms."""
    if isinstance(config, Mapping):
        yield from lr_schedulers_in([config[key] for key in ("lr_scheduler", "scheduler") if key in config])
    elif isinstance(config, (list, tuple)):
        for entry in config:
            yield from lr_schedulers_in(entry)
    elif config is not None and not hasattr(config, "param_groups"):
        yield config
