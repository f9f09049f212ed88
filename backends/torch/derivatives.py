"""What every backward of this backend is: a first derivative, of one output gradient at a time."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor


def first_only(backward: Callable) -> Callable:
    """A backward that raises where its own derivative would be asked for, or several backwards at once.

    torch's ``once_differentiable`` raises only if that derivative passes it on the way to all leaves: where inputs are
    named, as ``torch.autograd.functional.jvp`` and ``hessian`` do, it would be left out of the sum without a word.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():  # by create_graph=True alone
            raise RuntimeError(
                "the memory has first derivatives only. Received: create_graph=True, which second derivatives ask for, "
                "and torch.autograd.functional's jvp, hvp, vhp and hessian. Leave it out, or detach what the memory "
                "gives"
            )
        if not torch.compiler.is_compiling() and any([isinstance(d, Tensor) and _is_batch(d) for d in gradients]):
            raise RuntimeError(
                "the memory takes one gradient at a time. Received: several at once, as is_grads_batched=True, "
                "torch.autograd.functional's vectorize=True and vmap pass them. Leave these out, and call backward for "
                "each"
            )
        return backward(ctx, *gradients)

    return checked


def _is_batch(gradient: Tensor) -> bool:
    return is_legacy_batchedtensor(gradient) or is_batchedtensor(gradient)
