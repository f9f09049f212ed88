"""Ctrl-C between steps: half a step would leave weights that no step has made."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def noted(tell: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C is told to the user and noted, and the second interrupts at once.

    Outside the main thread, where Python gives no signals, nothing is noted.

    Yields:
        whether it came.
    """
    came = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()
        tell("stopping after this step; Ctrl-C again stops at once, and keeps the last checkpoint")

    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)
