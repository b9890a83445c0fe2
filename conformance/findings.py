"""What a check finds: one place, one sentence. The one type that every part of the validator passes around."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MANIFEST = "quant_manifest.json"


@dataclass(frozen=True)
class Finding:
    """One breach of a rule in one place. `kind` says which check it belongs to, where one reading serves several."""

    message: str
    pointer: str | None = None  # RFC 6901, into the JSON of `file`
    file: str = MANIFEST
    offset: int | None = None  # bytes from the start of `file`
    kind: str = ""
    code: str | None = None  # where it is not the check's
    rule: str | None = None  # where it is narrower than the check's


class NotReachedError(Exception):
    """A check could not be carried out, which is no verdict on the repository: its level is INCOMPLETE."""


def said(error: OSError) -> str:
    """Which file, and what the system said of it."""
    name = "" if error.filename is None else f"{brief(str(error.filename), 300)[1:-1]}: "
    return name + (error.strerror or brief(" ".join(str(error).split()), 300)[1:-1] or type(error).__name__)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Gives an OSError of the block the name of the file, where it has none: a write does not know it."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str):
            error.filename = name
        raise


def tell(text: str) -> None:
    """Prints `text`. Where that fails the OSError names standard output, and what is left is not tried again at the end."""
    try:
        with named("standard output"):
            print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def join(*parts: str | int) -> str:
    """The JSON pointer of `parts` (RFC 6901)."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def brief(value: object, limit: int = 60) -> str:
    """`value` as ASCII text fit for one line: no control character survives, and no more than `limit` characters."""
    if isinstance(value, str):
        value = value[: limit + 1]
    elif isinstance(value, list | dict) and len(value) > 8:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or isinstance(value, bool)
        else ascii(value)
    )
    return text if len(text) <= limit else text[: limit - 3] + "..."
