"""What kernels/left_align.py tells of a call; apart from it, as that needs triton."""

from typing import NamedTuple

from fwpkm.tokens import Array


class Places(NamedTuple):
    """Of streams ``[B, Q]``, each a row's pending tokens and then its new ones, and of the call's ``n`` tokens."""

    cells: Array
    """``[B·Q]`` int32: an index among the call's tokens and the pending ones."""
    entries: Array
    """``[n]`` int32: an index among the ``B·Q`` places: where each token of the call stands."""
    pending_entries: Array
    """``[B·P]`` int32: the same of what was pending; empty where nothing was."""
    mask: Array
    """``[B, Q]`` bool: an unmasked token stands there."""
    pair: Array
    """``[B, Q]`` bool: a write of this call may bind what stands there."""
    lengths: Array
    """``[B]`` int32: of the streams."""
    due: Array
    """``[B]`` int32: the chunks that they complete."""
