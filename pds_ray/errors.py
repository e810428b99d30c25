"""What the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend, said in one line: what is wrong, where, what to do. Exit code 2, no stack trace."""
