"""What users may ask of the engine, and what a step answers."""

from collections.abc import Container
from typing import Any, NamedTuple

from examples.serving.store import MOST

REFUSALS = (OSError, ValueError)
"""What concerns one user: a full disk, a file that is damaged."""


class Step(NamedTuple):
    """What a call did."""

    written: dict[str, bytes]
    """the byte that each user was answered with"""
    failed: dict[str, Exception]
    """users who could not be served or saved, and why; nothing of theirs is lost, and asking again tries again"""


def check_user(user: Any, users: Container[str]) -> None:
    """Raise unless it is one of them."""
    if not isinstance(user, str) or user not in users:
        raise ValueError(f"user must be one who has joined and was not deleted. Received: {user!r}")


def check_new(user: Any, users: Container[str]) -> None:
    """Raise unless it is a name that none of them has."""
    if not isinstance(user, str) or not 0 < len(user.encode(errors="replace")) <= MOST or not user.isprintable():
        raise ValueError(f"user must be a printable name of 1 to {MOST} bytes in UTF-8. Received: {user!r}")
    if user in users:
        raise ValueError(f"user must be a new name: delete the one who has it first. Received: {user!r}")


def check_text(text: Any) -> None:
    """Raise unless it is bytes, at least one."""
    if not isinstance(text, bytes) or not text:
        raise ValueError(f"text must be at least one byte, as bytes. Received: {text!r}")


def check_number(name: str, number: Any, least: int) -> None:
    """Raise unless it is an integer that is large enough."""
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}. Received: {number!r}")
