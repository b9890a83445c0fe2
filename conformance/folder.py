"""The directory under judgement, reached through one descriptor: nothing is followed out of it, nothing but regular files is opened."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from conformance.findings import NotReachedError, named

CHUNK = 2**22  # bytes read at a time

# the link that the Hub's local cache makes for each file of a snapshot
_HUB_LINK = re.compile(r"\.\./\.\./blobs/[0-9A-Za-z]{1,128}")
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW


class Folder:
    """An open directory. With `hub_cache`, links into its `../../blobs` stand for the files there [TQ-REPO-1]."""

    def __init__(self, path: str | Path, hub_cache: bool = False) -> None:
        self.path = Path(path)
        self.hub_cache = hub_cache
        self._directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._directory)

    def names(self) -> list[str]:
        """The names of all entries, in order."""
        with named(str(self.path)):
            return sorted(os.listdir(self._directory))

    def kind(self, name: str) -> str:
        """What `name` is: file, missing, link, directory, or something special; nothing is opened but the Hub's own links."""
        try:
            found = os.lstat(name, dir_fd=self._directory)
        except FileNotFoundError:
            return "missing"
        if self.hub_cache and stat.S_ISLNK(found.st_mode):
            try:
                os.close(self._open(name))
            except (OSError, NotReachedError):
                return "link"
            return "file"
        kinds = {stat.S_IFREG: "file", stat.S_IFLNK: "link", stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe"}
        return kinds.get(stat.S_IFMT(found.st_mode), "device or socket")

    def size(self, name: str) -> int:
        """The length of the regular file `name` in bytes."""
        file = self._open(name)
        try:
            return os.fstat(file).st_size
        finally:
            os.close(file)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes of the regular file `name` from `offset`; the caller has checked both against the file's length."""
        return b"".join(self.chunks(name, offset, size, CHUNK))

    def chunks(self, name: str, offset: int, size: int, chunk: int) -> Iterator[bytes]:
        """`size` bytes of the regular file `name` from `offset`, `chunk` bytes at a time."""
        file = self._open(name)
        try:
            end = offset + size
            while offset < end:
                with named(name):
                    data = _read(file, offset, min(chunk, end - offset))
                if not data:
                    raise NotReachedError(f"{name} became shorter while it was judged")
                yield data
                offset += len(data)
        finally:
            os.close(file)

    def _open(self, name: str) -> int:
        """A descriptor of the regular file `name`."""
        with named(name):
            return self._open_regular(name)

    def _open_regular(self, name: str) -> int:
        # the type first: opening a pipe would hang, and opening a device may do anything
        found = os.lstat(name, dir_fd=self._directory)
        if self.hub_cache and stat.S_ISLNK(found.st_mode):
            return self._open_blob(os.readlink(name, dir_fd=self._directory))
        if not stat.S_ISREG(found.st_mode):
            raise NotReachedError(f"{name} is not a regular file")
        return _regular(os.open(name, _FLAGS | os.O_NONBLOCK, dir_fd=self._directory), name)

    def _open_blob(self, target: str) -> int:
        if not _HUB_LINK.fullmatch(target):
            raise OSError(errno.ELOOP, "not a link of the Hub's cache", target)
        blobs = os.open("../../blobs", _FLAGS | os.O_DIRECTORY, dir_fd=self._directory)
        try:
            name = target.rpartition("/")[2]
            if not stat.S_ISREG(os.lstat(name, dir_fd=blobs).st_mode):
                raise OSError(errno.ELOOP, "not a regular file", target)
            return _regular(os.open(name, _FLAGS | os.O_NONBLOCK, dir_fd=blobs), target)
        finally:
            os.close(blobs)


def _read(file: int, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`, or none where the file ends before."""
    data = os.pread(file, length, offset)
    while data and len(data) < length:  # a signal or a network file system may cut a read short
        more = os.pread(file, length - len(data), offset + len(data))
        data = data + more if more else b""
    return data


def _regular(file: int, name: str) -> int:
    """`file`, after a second look: what was looked up and what was opened may differ."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise NotReachedError(f"{name} is not a regular file")
    return file
