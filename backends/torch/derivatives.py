"""What every backward of this backend is: a first derivative."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_only(backward: Callable) -> Callable:
    """A backward that raises where its own derivative would be asked for.

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
        return backward(ctx, *gradients)

    return checked
