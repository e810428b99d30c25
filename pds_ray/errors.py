"""Errors that the user can fix, and their wording: one line, without secrets, safe to print."""

from __future__ import annotations

import re
from collections.abc import Sequence

PLAIN_SETTINGS = ("region", "scheme", "endpoint_override", "account_name")
"""Settings of an object store that are part of its address; any other may be a secret."""

_REMOTE = re.compile(r"([\w+.-]*)://((?:(?!::[\w+.-]+://)\S)*)")
BUCKET_AT_HOST = ("abfs", "abfss", "wasb", "wasbs", "oci")
"""Schemes that write `bucket@host`, which is no login."""
_BUCKET = re.compile(r"[\w.-]+@(?=[^@]*$)")
# secrets hold slashes that people forget to encode: all up to the @, or what a slash left of one
_LOGIN = re.compile(
    r"^(?:[^/@]*(?::[^@]*)?@"
    r"|(?!\[[\da-fA-F:.]+\](?::\d{1,5})?(?:[^\w+%=.~:-]|$))"  # but the address of a host
    r"[^/@?:]*:(?!\d{1,5}(?:[^\w+%=.~-]|$))[^/@?]*)"
)


class UserError(Exception):
    """An error that the user can fix, in one line: what is wrong, where, what to do.

    The command line prints it without a stack trace and exits with code 2. URIs in the message are
    shown without their secrets.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class ConfigError(UserError, ValueError):
    """An option, or a combination of options, that is not allowed."""


def without_secrets(text: str) -> str:
    """Return a URI, or a text with URIs, as it may be shown and published.

    Users and passwords are left out, and all settings of a store but those in `PLAIN_SETTINGS`.
    """
    return _REMOTE.sub(lambda uri: f"{uri[1]}://{_without_secrets(*uri.groups())}", text)


def _without_secrets(scheme: str, rest: str) -> str:
    """Return the rest of a URI, after `://`, without its secrets."""
    bucket = _BUCKET.match(rest) if scheme in BUCKET_AT_HOST else None
    kept = bucket[0] if bucket else ""
    place, _, settings = (kept + _LOGIN.sub("", rest.removeprefix(kept))).partition("?")
    plain = [
        setting for setting in settings.split("&") if setting.partition("=")[0] in PLAIN_SETTINGS
    ]
    return place + ("?" + "&".join(plain) if plain else "")


def first_line(error: BaseException) -> str:
    """Return an error's message, or its kind, as one line without secrets that is safe to print."""
    return printable(without_secrets((str(error).strip() or type(error).__name__).splitlines()[0]))


def cause(error: BaseException) -> str:
    """Return why a file's content could not be used, in words and as `first_line` does.

    A missing entry is all that a KeyError says of itself.
    """
    if isinstance(error, KeyError):
        return printable(f"it has no {error.args[0]!r}" if error.args else "an entry is missing")
    return first_line(error)


def is_utf8(text: str) -> bool:
    """Return False for text, such as a file's name, made of bytes that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def some_of(names: Sequence[str], shown: int = 3) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def printable(text: str) -> str:
    """Return text that a terminal only shows.

    Characters that it would act on (escapes, line breaks, directions) are spelled out.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def squashed(name: str) -> str:
    """Return a name without case and separators: equal for all spellings of one name.

    `ViT-L/14@336px`, `vit_l_14_336` and `ViT-L-14-336` are one.
    """
    return re.sub(r"[^a-z0-9]|(?<=\d)px\b", "", name.lower())
