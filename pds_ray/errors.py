"""What the user can mend, and how it is said: in one line, without secrets, safe on a terminal."""

from __future__ import annotations

import re

PLAIN_SETTINGS = ("region", "scheme", "endpoint_override")
"""Settings of an object store that are part of its address; any other may be a secret."""

_REMOTE = re.compile(r"(?<=://)(?:(?!::[\w+.-]+://)\S)*")
_LOGIN = re.compile(  # secrets hold slashes that people forget to encode: all up to the @, or what a slash left of one
    r"^(?:[^/@]*(?::[^@]*)?@|[^/@?:]*:(?!\d{1,5}(?:[^\w+%=.~-]|$))[^/@?]*)"
)


class UserError(Exception):
    """Something the user can mend, said in one line: what is wrong, where, what to do. Exit code 2, no stack trace.

    URIs in the message are shown without their secrets.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class ConfigError(UserError, ValueError):
    """An option, or a combination of options, that cannot be."""


def without_secrets(text: str) -> str:
    """A URI, or a text with URIs, as it may be shown and published.

    Users and passwords are left out, and all settings of a store but those in `PLAIN_SETTINGS`.
    """
    return _REMOTE.sub(lambda uri: _without_secrets(uri[0]), text)


def _without_secrets(rest: str) -> str:
    """What follows `://` in a URI."""
    place, _, settings = _LOGIN.sub("", rest).partition("?")
    plain = [
        setting for setting in settings.split("&") if setting.partition("=")[0] in PLAIN_SETTINGS
    ]
    return place + ("?" + "&".join(plain) if plain else "")


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line without secrets that is safe to print; its kind if it says nothing."""
    return printable(without_secrets((str(error).strip() or type(error).__name__).splitlines()[0]))


def printable(text: str) -> str:
    """Text that a terminal only shows: what it would act on (escapes, line breaks, directions) is spelled out."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
