"""The one exception whose message is meant for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """One line that says what is wrong, where, and what to do; the command line prints it and exits with code 2.

    Args:
        lines: several where several things are wrong at once.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        return "; ".join(self.lines)
