"""What the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend, said in one line: what is wrong, where, what to do. Exit code 2, no stack trace."""


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
