"""Checks of arguments that only torch needs: devices, autograd, and each signature of a call but once."""

from typing import Any

import torch
from torch import Tensor

from fwpkm import validation
from fwpkm.backends.torch.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State
from fwpkm.tokens import Tokens

_FITTING: set[tuple] = set()
_MOST_SIGNATURES = 1000
_COUNTING = ("state.position", "mask", "cu_seqlens")


def check_apply(cfg: FwPKMConfig, state: State, inputs: Tokens, cu_seqlens: Any, update: Any) -> None:
    """Check the arguments of ``apply``, of one signature once: that takes longer than some kernels.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what was received.
    """
    validation.check_flag("update", update)
    signature = None if cu_seqlens is not None else _signature_of(cfg, state, inputs)
    if signature is not None and signature in _FITTING:
        return
    validation.check_apply(cfg, state, inputs, cu_seqlens, update, SELF)
    check_device(inputs.query, **inputs._asdict(), cu_seqlens=cu_seqlens)
    check_state_device(inputs.query, state)
    if len(_FITTING) > _MOST_SIGNATURES:
        _FITTING.clear()
    if signature is not None:
        _FITTING.add(signature)


def _signature_of(cfg: FwPKMConfig, state: State, inputs: Tokens) -> tuple | None:
    """What the checks look at; None of what is no tensor, or has symbols for sizes: those have no hash."""
    if not (isinstance(cfg, FwPKMConfig) and isinstance(state, State) and isinstance(state.memory, Memory)):
        return None
    leaves = [*state.memory, *state.pending, state.position, state.maybe_uses, *inputs]
    if not all([x is None or isinstance(x, Tensor) for x in leaves]):
        return None
    signature = (cfg, *[None if x is None else (x.shape, x.dtype, x.device) for x in leaves])
    try:
        hash(signature)
    except TypeError:
        return None
    return signature


def check_device(tokens: Tensor, /, **others: Any) -> None:
    """Raise a ValueError unless all lie where the tokens (x, query) do; those that count may lie on the CPU."""
    for name, x in others.items():
        if isinstance(x, Memory):
            check_device(tokens, **{f"{name}.{field}": table for field, table in x._asdict().items()})
        elif x is not None and x.device != tokens.device and not (name in _COUNTING and x.device.type == "cpu"):
            raise ValueError(f"{name} must be on the tokens' device, {tokens.device}. Received: {name} on {x.device}")


def check_state_device(tokens: Tensor, state: State) -> None:
    """``check_device`` of what a state holds."""
    check_device(tokens, **{f"state.{name}": x for name, x in state.arrays().items()})


def check_inplace(inplace: bool, *tensors: Tensor | None) -> None:
    """Raise a RuntimeError where autograd needs what a call may overwrite, or where that was made for inference."""
    validation.check_flag("inplace", inplace)
    overwritten = [x for x in tensors if x is not None]
    if inplace and not torch.is_inference_mode_enabled() and any(x.is_inference() for x in overwritten):
        raise RuntimeError(
            "inplace=True would overwrite tensors that were made under torch.inference_mode(): call under it too, or "
            "with inplace=False. Received: a state with inference tensors"
        )
    if inplace and torch.is_grad_enabled() and any(x.requires_grad for x in overwritten):
        raise RuntimeError(
            "inplace=True would overwrite tensors of the state that autograd still needs: pass state.detach(), or "
            "inplace=False. Received: a state with requires_grad=True"
        )


def check_dtype(dtype: Any) -> None:
    """Raise a ValueError unless a layer's weights can have this dtype."""
    if dtype not in (None, torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(
            "dtype must be torch.float32, float64, bfloat16 or float16, or None for torch's default. "
            f"Received: {dtype!r}"
        )


def check_present(device: Any, name: str = "device") -> None:
    """Raise a ValueError where a device of CUDA is asked for, and there is none."""
    cuda = isinstance(device, int) or str(device).startswith("cuda")  # a number is that of a CUDA device
    if cuda and not torch.cuda.is_available():
        raise ValueError(
            f"{name} must be one that torch finds here, and it finds no CUDA device: install a build of torch with "
            f"CUDA and its driver, or leave {name} out for the CPU. Received: {str(device)!r}"
        )
