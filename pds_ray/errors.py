"""What the user can mend, and how to say it on a terminal."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend, said in one line: what is wrong, where, what to do. Exit code 2, no stack trace."""


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line that is safe to print; its kind if it says nothing."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def printable(text: str) -> str:
    """Text that a terminal only shows: what it would act on (escapes, line breaks, directions) is spelled out."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
