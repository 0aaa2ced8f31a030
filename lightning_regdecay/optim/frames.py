"""Who is running: what the stack of calls tells of a step, and nothing else does."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

from torch import Tensor

_DCP = "torch.distributed.checkpoint.state_dict"


def caller_of(hook: Callable[..., Any]) -> FrameType:
    """The frame that has called a running hook: that of torch's wrapper of ``step``, or of our layer."""
    frame: Any = sys._getframe(1)
    while frame.f_code is not hook.__code__:
        frame = frame.f_back
    frame = frame.f_back
    while _module_of(frame).startswith("torch._"):
        frame = frame.f_back
    return frame  # type: ignore[no-any-return]


def is_running(frame: FrameType) -> bool:
    """Whether the function of a frame has not ended yet, in whatever thread."""
    return any(running is frame for top in sys._current_frames().values() for running in _stack(top))


def is_alive(thread: int) -> bool:
    """Whether a thread has not ended yet."""
    return thread in sys._current_frames()


def is_rehearsal(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether this is the step with zero gradients and lr 0 that ``torch.distributed.checkpoint`` (2.6 to 2.13) makes.

    It does so before it saves or loads, to have a state of the optimizer.
    """
    if not all(_is_zero(group.get("lr")) for group in groups):
        return False
    return any(_is_of_dcp(frame, "_init_optim_state") for frame in _stack(sys._getframe(1)))


def flat_state_to_load() -> Mapping[str, Any] | None:
    """The flattened state that ``torch.distributed.checkpoint`` is about to load, where this is its rehearsal."""
    loading = next((f for f in _stack(sys._getframe(1)) if _is_of_dcp(f, "_load_optim_state_dict")), None)
    state = None if loading is None else loading.f_locals.get("state_dict")
    return state if isinstance(state, Mapping) and state and "state" not in state else None


def is_called_by_deepspeed() -> bool:
    """Whether it is DeepSpeed's engine that makes the step."""
    if "deepspeed" not in sys.modules:
        return False
    return any(_module_of(frame).startswith("deepspeed.") for frame in itertools.islice(_stack(sys._getframe(1)), 16))


def _is_zero(lr: Any) -> bool:
    on_gpu = isinstance(lr, Tensor) and lr.device.type != "cpu"  # not to be waited for; the rehearsal's is none
    return lr is None or not (on_gpu or float(lr))


def _is_of_dcp(frame: FrameType, name: str) -> bool:
    return frame.f_code.co_name == name and _module_of(frame) == _DCP


def _stack(top: FrameType) -> Iterator[FrameType]:
    """The frames of the functions that are running. One at a time: a frame with a list of them would never be freed."""
    frame: FrameType | None = top
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
