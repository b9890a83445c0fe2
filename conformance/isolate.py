"""Runs the embedded loader in a process of its own, without network and within limits, and gives out its weights.

Nothing that comes from that process is trusted: lines are short, sizes are those that the manifest gives.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from conformance.findings import NotReachedError, brief
from conformance.jsonio import read_object

MAX_LINE = 2**16


class LoaderError(Exception):
    """The loader failed; `code` is LIMIT.TIME, LIMIT.MEMORY or DATA.DECODE."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Loader:
    """A loader's process: `start` hands it the text, `event` reads a line of what it says, `read` the bytes after it."""

    process: subprocess.Popen[bytes]
    file: Path  # for the text
    pipe: int
    seconds: float  # of waiting that are left
    errors: IO[bytes]
    buffer: bytearray

    def start(self, program: bytes) -> None:
        """Has the loader whose text is `program` decode: what was judged, and not a file that may change meanwhile."""
        self.file.write_bytes(program)
        assert self.process.stdin
        with suppress(BrokenPipeError), self.process.stdin as go:  # if it ended by itself, `event` will say so
            go.write(b"\n")

    def event(self) -> dict[str, Any]:
        """The loader's next event: isolated, tensor or end."""
        while b"\n" not in self.buffer[:MAX_LINE]:
            if len(self.buffer) > MAX_LINE:
                raise LoaderError("DATA.DECODE", "the loader does not keep to the protocol")
            self._fill()
        line, _, rest = bytes(self.buffer).partition(b"\n")
        self.buffer[:] = rest
        event = read_object(line).value
        if not event or event.get("event") not in ("isolated", "tensor", "end", "error"):
            raise LoaderError("DATA.DECODE", "the loader does not keep to the protocol")
        if event["event"] == "error":
            raise self._failed(str(event.get("type")), str(event.get("message")))
        return event

    def read(self, size: int) -> bytes:
        """The next `size` bytes, a size that the caller has bounded."""
        while len(self.buffer) < size:
            self._fill()
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def _fill(self) -> None:
        start = time.monotonic()
        ready, _, _ = select.select([self.pipe], [], [], max(0.0, self.seconds))
        self.seconds -= time.monotonic() - start
        if not ready:
            raise LoaderError("LIMIT.TIME", "the loader used up its time; allow more with --loader-seconds")
        data = os.read(self.pipe, 2**20)
        if not data:
            raise self._ended()
        self.buffer += data

    def _failed(self, kind: str, message: str) -> Exception:
        # the last is what the system's linker says of a library that does not fit
        signs = ("can't allocate memory", "Cannot allocate memory", "failed to map segment")
        if kind == "MemoryError" or any(sign in message for sign in signs):
            return LoaderError(
                "LIMIT.MEMORY", f"the loader ran out of memory; allow more with --loader-memory ({brief(message, 200)})"
            )
        if kind in ("ModuleNotFoundError", "ImportError"):
            return NotReachedError(f"UNSUPPORTED.LIBRARY: the loader could not be imported ({brief(message, 200)})")
        return LoaderError("DATA.DECODE", f"the loader raised {brief(kind)[1:-1]}: {brief(message, 400)[1:-1]}")

    def _ended(self) -> LoaderError:
        try:
            status = self.process.wait(max(0.0, min(10.0, self.seconds)))
        except subprocess.TimeoutExpired:
            return LoaderError("DATA.DECODE", "the loader closed its pipe before the end")
        number = status - 128 if status > 128 else -status  # the driver's own child, or the driver
        if number == signal.SIGXCPU:
            return LoaderError("LIMIT.TIME", "the loader used up its processor time; allow more with --loader-seconds")
        self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, self.errors.tell() - 400))
        last = self.errors.read().decode("ascii", "replace")
        return LoaderError("DATA.DECODE", f"the loader ended with status {status}: {brief(last, 400)[1:-1]}")


@contextmanager
def waiting(repository: Path, memory: int, seconds: int, allow_network: bool) -> Iterator[Loader]:
    """A process that shuts itself off, imports torch, and waits for the text of a loader for `repository`.

    It is stopped when the block ends, and so is all it started, where the system has namespaces of processes.
    """
    limits = json.dumps({"memory": memory, "seconds": seconds, "allow_network": allow_network})
    driver = Path(__file__).with_name("loader_driver.py")
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile() as errors:
        loader, empty = Path(home) / "load_quantized.py", Path(home) / "empty"
        empty.mkdir()
        receive, send = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(driver), str(send), str(loader), str(repository.resolve()), limits],
            cwd=empty,
            env={
                "HOME": str(empty),
                "PATH": "/usr/bin:/bin",
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "LC_ALL": "C.UTF-8",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=[send],
            start_new_session=True,
        )
        os.close(send)
        try:
            yield Loader(process, loader, receive, seconds, errors, bytearray())
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(receive)
