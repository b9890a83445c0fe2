"""Files that cannot be written: which file it was, what the system said, what to do. Needs no torch."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
TORN = "it could not be written in full"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """OSError, with `path` as its file unless it names one, for what says that the disk is full or not to be written to.

    Python names the file where it cannot be opened, but not where writing to it fails; torch and safetensors have errors
    of their own for both.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in FULL + CLOSED:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        if (found := _disk_error(error, path)) is None:
            raise
        raise found from error


def _disk_error(error: Exception, path: Path) -> OSError | None:
    """What an error of torch or safetensors says of the disk, if it does."""
    text = str(error)
    if "inline_container" in text and re.search(
        "unexpected pos|write failed", text
    ):  # torch.save, which gives no reason
        return OSError(errno.EIO, TORN, str(path))
    told = re.search(r"\((?:os error )?(\d+)\)", text)  # "No space left on device (os error 28)", or (28)
    if type(error).__name__ != "SafetensorError" and not (isinstance(error, RuntimeError) and "file <" in text):
        return None
    if told is None or int(told[1]) not in FULL + CLOSED:
        return None
    named = re.search(r"file <(.+?)>", text)
    return OSError(int(told[1]), text[: told.start()].rpartition(": ")[2].strip(), named[1] if named else str(path))


def describe(error: OSError, fallback: Path | str) -> str:
    """The error in words: the file (`fallback` where it names none), what the system said, and what to do."""
    if error.errno is None:  # one of ours, or of a library: its text is the message
        return str(error)
    advice = ""
    if error.errno in FULL or error.strerror == TORN:
        advice = "; free some space or choose another place, and the same command goes on"
    elif error.errno in CLOSED:
        advice = "; choose another place, or allow this one to be written to"
    return f"{error.filename or fallback}: {error.strerror}{advice}"


def add_documents(repo: Path, contents: dict[str, bytes]) -> None:
    """Adds or replaces documents of a finished repository, all of them or none."""
    from tqformat.writer import add_files  # brings torch

    with writing(repo):
        add_files(repo, {name: ("document", content) for name, content in contents.items()})


def replace_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8; the file is the old one or the new one, never a part."""
    new = path.with_name(f".{path.name}.new")
    try:
        with writing(path):
            new.write_text(text, "utf-8", newline="\n")
            new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink()
        raise
