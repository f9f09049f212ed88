"""What a call must not run inside of: transforms that it cannot follow, checkpoints that would lose gradients."""

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointFunction

from fwpkm.containers import State, Trace

Result: TypeAlias = tuple[Tensor, State | None, Trace]
_CUT = "_fwpkm_left_reentrant_checkpoint"
"""Marks the position of a state."""


def check_transforms() -> None:
    """Raise a RuntimeError where torch.func, forward-mode autograd or torch.jit.trace transforms the call."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(
            "the memory cannot run inside torch.func's transforms (grad, vmap, jvp, ...) or forward-mode autograd: "
            "take gradients by backward() or torch.autograd.grad, and put more rows into a batch instead of vmap"
        )
    if torch.jit.is_tracing():
        raise RuntimeError(
            "the memory cannot be traced by torch.jit.trace, which would fix the number of writes: use torch.export"
        )


def through_checkpoints(call: Callable[..., Result]) -> Callable[..., Result]:
    """Let a call of ``(cfg, state, ...)`` refuse states through which a reentrant checkpoint passes no gradient.

    ``torch.utils.checkpoint(..., use_reentrant=True)`` passes gradients through the tensors that it is given and
    returns, and not through those that lie in a tuple. It runs forward without gradients, so nothing else shows it.
    """

    @functools.wraps(call)
    def followed(cfg: Any, state: Any, *args: Any, **kwargs: Any) -> Result:
        if torch.compiler.is_compiling():
            return call(cfg, state, *args, **kwargs)
        reentrant = _in_reentrant_checkpoint()
        if isinstance(state, State):
            _check_lineage(state, reentrant)
        output, after, trace = call(cfg, state, *args, **kwargs)
        if reentrant and after is not None:
            after = after._replace(position=after.position.clone())
            setattr(after.position, _CUT, True)
        return output, after, trace

    return followed


def _check_lineage(state: State, reentrant: bool) -> None:
    """Raise a RuntimeError where a gradient through the state would be lost."""
    cut = getattr(state.position, _CUT, False) and (reentrant or torch.is_grad_enabled())
    if cut or (reentrant and any(x.requires_grad for x in state.arrays().values())):
        raise RuntimeError(
            "torch.utils.checkpoint with use_reentrant=True passes no gradient through a state: call it with "
            "use_reentrant=False, or cut the history with fwpkm.backends.torch.detach(state). Received: a state that "
            f"{'came out of' if cut else 'went into'} such a checkpoint"
        )


def _in_reentrant_checkpoint() -> bool:
    """Whether such a checkpoint runs the call for the first time."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None
