"""Files of models, tried before any long work: whole or cut off. No tensor is read."""

from __future__ import annotations

import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pds_ray.config import ConfigError
from pds_ray.errors import first_line

HEAD_BYTES = 64
SHOWN = 300  # characters of a library's reason
INSTEAD = {  # how a file begins that was saved in place of the weights -> what to do
    b"version https://git-lfs": "it is a Git LFS pointer: run git lfs pull",
    b"<": "it is a web page: download the weights again",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ZIP, PICKLE = b"PK", b"\x80"  # how files of torch.save begin, now and before 2020


def require_whole(path: Path, who: str) -> None:
    """Return if a file of weights is complete: its header or directory agrees with its size.

    Nothing in it is executed. Raises ConfigError in one line that says what `who` needs it.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):  # checks header, offsets and size
                return
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
        if head.startswith(ZIP):
            zipfile.ZipFile(path).close()  # reads the directory at its end
        elif path.suffix != ".npz" and not head.startswith(PICKLE):
            raise zipfile.BadZipFile("neither a zip nor a pickle")
    except (SafetensorError, zipfile.BadZipFile, OSError) as error:
        raise ConfigError(
            f"{who}: the weights {path} are cut off or damaged ({first_line(error)}); "
            f"{_advice(path)}"
        ) from error


def _advice(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES).lstrip()
    except OSError:
        return "make it readable"
    fitting = (advice for start, advice in INSTEAD.items() if head.startswith(start))
    return next(fitting, "fetch the file again")


def require_vocabulary(tokenize: Callable[[list[str]], Any]) -> None:
    """Raise ValueError if a tokenizer, given as texts -> rows of tokens, knows no words.

    transformers makes such a one in silence where the file of its vocabulary is missing.
    """
    rows = {tuple(map(int, row)) for row in tokenize([*LETTERS])}
    if len(rows) < len(LETTERS) / 2:
        raise ValueError("it tells no captions apart: its vocabulary is missing")


def loading_reason(error: BaseException) -> str:
    """Return in one line why weights do not load.

    torch says in its first line that they do not, and in the next what does not fit.
    """
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    if first.startswith("Error(s) in loading state_dict") and rest:
        first = rest[0].strip()
    return textwrap.shorten(first_line(ValueError(first)), SHOWN, placeholder=" ...")
