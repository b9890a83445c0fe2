"""The loader as a file of a model repository: load_quantized.py, unchanged, with one line that says which release it is.

The last line of an embedded loader is a comment, the stamp:

    # tqformat-stamp: {"format": "1.0", "version": "1.0.0", "body_sha256": "..."}

body_sha256 is the SHA-256 of all bytes before that line, which are those of tqformat/load_quantized.py in that release.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from . import load_quantized
from .load_quantized import TQFormatError

LOADER = "load_quantized.py"
PREFIX = b"# tqformat-stamp: "


@dataclass(frozen=True)
class Stamp:
    format: str
    version: str
    body_sha256: str


def stamped_loader() -> bytes:
    """The bytes of the loader to embed: this package's load_quantized.py and its stamp."""
    body = Path(load_quantized.__file__).read_bytes()
    stamp = {"format": "1.0", "version": load_quantized.__version__, "body_sha256": hashlib.sha256(body).hexdigest()}
    return body + PREFIX + json.dumps(stamp).encode() + b"\n"


def read_stamp(loader: bytes, where: str = LOADER) -> Stamp:
    """The stamp of an embedded loader, checked against its body; TQFormatError BIND.LOADER if it does not fit."""
    start = loader.removesuffix(b"\n").rfind(b"\n") + 1
    body, line = loader[:start], loader[start:]
    try:
        stamp = Stamp(**json.loads(line.removeprefix(PREFIX))) if line.startswith(PREFIX) else None
    except (ValueError, TypeError):
        stamp = None
    if stamp is None:
        raise TQFormatError(
            "BIND.LOADER", where, "expected a stamp in the last line; this is not an embedded tqformat loader"
        )
    digest = hashlib.sha256(body).hexdigest()
    if digest != stamp.body_sha256:
        raise TQFormatError(
            "BIND.LOADER", where, f"expected a body with sha256 {stamp.body_sha256}, got {digest}: it was changed"
        )
    return stamp


def embed(repo: str | os.PathLike[str]) -> Path:
    """Puts this release's loader into a finished repository, or replaces the one there, and lists it in the manifest."""
    from .writer import add_files

    add_files(repo, {LOADER: ("code", stamped_loader())})
    return Path(repo) / LOADER
